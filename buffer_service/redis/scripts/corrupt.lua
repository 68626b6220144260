-- requires: groups stock
-- ARGV: tid, what is wrong. Lists the record and takes it out: a replay alone, a fresh one with its whole group.
-- Returns 0 when it was listed before, or was removed meanwhile.
local m, tid = meta(), ARGV[1]
local gid = string.sub(tid, 1, 8)
local raw = call('HGET', K('groups'), gid)
if not raw and call('HEXISTS', K('trajs'), tid) == 0 then return 0 end
if call('HSETNX', K('corrupt'), tid, ARGV[2]) == 0 then return 0 end
if raw then
  local g = group(raw)
  for i = 0, g.n - 1 do forget_value(m, tid_of(gid, i)) end
  del(m, 'groups', gid)
  call('ZREM', K('fresh'), gid)
  call('HINCRBY', K('steps'), g.step, -1)
  count('dropped:corrupt_record', 1)
else
  stock_remove(m, tid)
end
return 1
