-- ARGV[1]: packed {gid, seq, step, pid, hinted, tokens, tkey, bound, rewards}; ARGV[2]: packed {pid, step, hinted, n, zero,
-- successes, versions}, kept as it is while the group is fresh; ARGV[3..]: the encoded trajectories. Returns {status,
-- evicted}. bound -2: trajectories from a file, for replay only, without a ticket. Every check comes before the first write.
local m, a = meta(), cmsgpack.unpack(ARGV[1])
local gid, seq, step, pid, hinted, tkey, bound = a[1], a[2], a[3], a[4], a[5], a[7], a[8]
if call('GETBIT', K('seen'), seq) == 1 then
  count('duplicates', 1)
  return { 'duplicate', 0 }
end
local raw = call('HGET', K('tickets'), tkey)
local t = raw and cmsgpack.unpack(raw)
local imported = bound == -2
if imported and t then fail('TAKEN', 'group ' .. gid .. ' is what a ticket of this run waits for') end
if not t and not imported and step > m.trained then fail('UNKNOWN', 'group ' .. gid .. ' has no ticket in this run') end
if t and (t[1] ~= pid or t[2] ~= step) then
  fail('UNKNOWN', 'group ' .. gid .. ' is of prompt ' .. pid .. ' and step ' .. step .. ', its ticket asks for ' .. t[1] ..
    ' and step ' .. t[2])
end

local late = imported or step <= m.trained or (bound >= 0 and step + bound < m.version)
local values, n = {}, #a[9]
for i = 1, n do values[2 * i - 1], values[2 * i] = K('t:' .. tid_of(gid, i - 1)), ARGV[i + 2] end
call('MSET', unpack(values)) -- first, so that a full Redis refuses before anything else is written
call('SETBIT', K('seen'), seq, 1)
if t then drop_ticket(m, tkey, t) end -- a passed step's ticket may be gone; its group still serves replay
fold_visit(m, pid, seq, a[9], hinted)
count('generated', 1)
count('completions', n)
count('tokens', a[6])
if not late then
  put(m, 'groups', gid, ARGV[2])
  call('ZADD', K('fresh'), step * STEP + seq, gid)
  return { 'fresh', 0 }
end
local q = thresholds(m)
make_replayable(m, q, gid, cmsgpack.unpack(ARGV[2]))
count('replay_only', 1)
if imported then count('imported', 1) elseif step > m.trained then call('HINCRBY', K('steps'), step, -1) end
return { 'late', evict(m, q, n) }
