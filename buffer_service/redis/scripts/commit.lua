-- requires: requests replayable
-- ARGV: step, new version, fencing token, gid... Acknowledges a trained step once: its groups become replayable, the
-- version grows, draws of the step are counted as reuse. Returns {committed, version, trained groups, replay-only
-- groups, evicted}.
local m = meta()
local step, version = tonumber(ARGV[1]), tonumber(ARGV[2])
check_token(m, ARGV[3])
if step <= m.trained then return { 0, m.version, 0, 0, 0 } end
if version < m.version then fail('VERSION', 'version ' .. ARGV[2] .. ' is older than ' .. m.version) end
local trained, named = {}, 0
for i = 4, #ARGV do
  local place = tonumber(call('ZSCORE', K('fresh'), ARGV[i]))
  if not place or place >= (step + 1) * STEP then
    fail('UNKNOWN', 'group ' .. ARGV[i] .. ' is not waiting to be trained in step ' .. ARGV[1])
  end
  if not trained[ARGV[i]] then named = named + 1 end
  trained[ARGV[i]] = true
end

call('HSET', K('meta'), 'trained', step, 'version', version)
m.trained, m.version = step, version
local q, rest, added = thresholds(m), 0, 0
for _, gid in ipairs(call('ZRANGEBYSCORE', K('fresh'), '-inf', '(' .. (step + 1) * STEP)) do
  local g = group(call('HGET', K('groups'), gid))
  make_replayable(m, q, gid, g)
  added = added + g.n
  del(m, 'groups', gid)
  call('ZREM', K('fresh'), gid)
  if not trained[gid] then rest = rest + 1 end
end
count('trained_fresh', named)
count('replay_only', rest)
count('steps', 1)

local drawn, marks = {}, call('HVALS', K('drawn'))
for _, packed in ipairs(marks) do
  for _, tid in ipairs(cmsgpack.unpack(packed)) do drawn[tid] = true end
end
for tid in pairs(drawn) do
  if call('HEXISTS', K('trajs'), tid) == 1 then
    keep(m, 'reuse', tid)
    local used = call('HINCRBY', K('reuse'), tid, 1)
    if used == 1 then tally('reuse', 1) end
    if m.max_reuse > 0 and used >= m.max_reuse then
      stock_remove(m, tid)
      count('reused_up', 1)
    end
  end
  count('replayed', 1)
end
call('DEL', K('drawn'), K('freshlease'))
untally('drawn')

-- Requests of passed steps that nobody holds will not be asked for any more.
for _, rkey in ipairs(call('ZRANGEBYSCORE', K('pend:t'), '-inf', '(' .. (step + 1) * STEP)) do
  drop_request(m, rkey, load_request(rkey))
end
for _, s in ipairs(call('HKEYS', K('steps'))) do
  if tonumber(s) <= step then call('HDEL', K('steps'), s) end
end
expire_old(m, added)
return { 1, version, named, rest, q and evict(m, q, added) or 0 }
