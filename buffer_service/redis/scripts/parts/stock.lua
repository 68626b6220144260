-- requires: snapshot
-- The replayable trajectories: `trajs` has {prompt, success 0|1, version, advantage} of each, stock:f and stock:s order them by
-- their prompt's place, stock:v by version, pt:<prompt> by success; age:<kind>:<bin> has those of one 1/16 of places,
-- oldest first.
local KINDS = { 'f', 's' } -- failures, successes
local LINGER_MS, SNAPSHOT_LINGER_MS = 10000, 3600000 -- a removed value stays readable for who has just drawn it

local function kind_of(success) return success == 1 and 's' or 'f' end
local function bin_of(at) return math.max(-64, math.min(64, floor(at * 16))) end
local function age_key(kind, bin) return K('age:' .. kind .. ':' .. string.format('%d', bin)) end

local function stock_add(tid, pid, success, version, at)
  local kind = kind_of(success)
  call('ZADD', K('stock:' .. kind), at, tid)
  call('ZADD', K('stock:v'), version, tid)
  call('ZADD', K('pt:' .. pid), success, tid)
  call('ZADD', age_key(kind, bin_of(at)), 0, tid)
end

local function forget_value(m, tid)
  call('PEXPIRE', K('t:' .. tid), m.snap > 0 and SNAPSHOT_LINGER_MS or LINGER_MS)
end

local function stock_remove(m, tid)
  local pid, success = unpack(cmsgpack.unpack(call('HGET', K('trajs'), tid)))
  local kind = kind_of(success)
  local at = tonumber(call('ZSCORE', K('stock:' .. kind), tid))
  call('ZREM', K('stock:' .. kind), tid)
  call('ZREM', K('stock:v'), tid)
  call('ZREM', K('pt:' .. pid), tid)
  call('ZREM', age_key(kind, bin_of(at)), tid)
  del(m, 'trajs', tid)
  if call('HEXISTS', K('reuse'), tid) == 1 then tally('reuse', -1) end
  del(m, 'reuse', tid)
  forget_value(m, tid)
end

-- Trajectories too many versions old go, at most REPAIR more than the call has `added`. Returns how many went.
local function expire_old(m, added)
  if m.max_age == 0 then return 0 end
  local limit = REPAIR + added
  local old = call('ZRANGEBYSCORE', K('stock:v'), '-inf', '(' .. (m.version - m.max_age), 'LIMIT', 0, limit)
  for _, tid in ipairs(old) do stock_remove(m, tid) end
  if #old > 0 then count('aged_out', #old) end
  return #old
end
