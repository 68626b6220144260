-- ARGV[1]: packed {gid, seq, step, pid, hinted, tokens, tkey, bound, zero, rewards, successes, versions}; ARGV[2..]: the
-- encoded trajectories. Returns {status, evicted}. Every check comes before the first write.
local m, a = meta(), cmsgpack.unpack(ARGV[1])
local gid, seq, step, pid, hinted, tkey, bound = a[1], a[2], a[3], a[4], a[5], a[7], a[8]
if call('GETBIT', K('seen'), seq) == 1 then
  count('duplicates', 1)
  return { 'duplicate', 0 }
end
local raw = call('HGET', K('tickets'), tkey)
if not raw then fail('UNKNOWN', 'group ' .. gid .. ' has no ticket in this run') end
local t = cmsgpack.unpack(raw)
if t[1] ~= pid then fail('UNKNOWN', 'group ' .. gid .. ' is of prompt ' .. pid .. ', its ticket asks for ' .. t[1]) end
if t[2] ~= step then fail('UNKNOWN', 'group ' .. gid .. ' says step ' .. step .. ', its ticket says ' .. t[2]) end

local late = step <= m.trained or (bound >= 0 and step + bound < m.version)
local values, records, n = {}, {}, #a[10]
for i = 1, n do
  local tid = tid_of(gid, i - 1)
  values[#values + 1], values[#values + 2] = K('t:' .. tid), ARGV[i + 1]
  keep(m, 'trajs', tid)
  records[#records + 1] = tid
  records[#records + 1] = cmsgpack.pack({ pid, a[11][i], a[12][i], step })
end
call('MSET', unpack(values)) -- first, so that a full Redis refuses before anything else is written
call('HSET', K('trajs'), unpack(records))
call('SETBIT', K('seen'), seq, 1)
drop_ticket(m, tkey, t)
visit(m, pid, seq, a[10], hinted)
count('generated', 1)
count('completions', n)
count('tokens', a[6])
local group, q = { pid, step, hinted, n, a[9] }, thresholds(m)
if late then
  make_replayable(m, q, gid, group)
  count('replay_only', 1)
  if step > m.trained then call('HINCRBY', K('steps'), step, -1) end
else
  put(m, 'groups', gid, cmsgpack.pack(group))
  call('ZADD', K('fresh'), step * STEP + seq, gid)
end
return { late and 'late' or 'fresh', evict(m, q) }
