-- What every script has: key names, the run's state, counters. KEYS[1] is the run's prefix, "avatar:{run}:".
local P = KEYS[1]
local STEP = 100000000 -- a sequence number is below this, so step * STEP + seq orders requests and stays under 2^53
local REPAIR = 512 -- removals at once, within Lua's stack; a call may add this many to what it has to make room for
local UNCHECKED = -1 -- in place of a fencing token or a staleness bound; scripting.py has it too

local function K(name) return P .. name end
local call, floor = redis.call, math.floor
local function fail(kind, text) error('AVATAR_' .. kind .. ' ' .. text, 0) end
-- Counts the fields of a hash whose loss nothing else would show (books.lua).
local function tally(hash, n)
  if call('HEXISTS', K('meta'), 'n_' .. hash) == 1 then call('HINCRBY', K('meta'), 'n_' .. hash, n) end
end
local function untally(hash)
  if call('HEXISTS', K('meta'), 'n_' .. hash) == 1 then call('HSET', K('meta'), 'n_' .. hash, 0) end
end
local function count(name, n) call('HINCRBY', K('ledger'), name, n) end

-- The run's state and, in `packed`, the settings of the run. The fencing token's field is `epoch` since layout 1.
local function meta()
  local raw = call('HMGET', K('meta'), 'version', 'trained', 'epoch', 'snap', 'kl_step', 'packed')
  if not raw[1] then fail('NORUN', 'no run under ' .. P) end
  local m = cmsgpack.unpack(raw[6])
  m.version, m.trained, m.fencing_token = tonumber(raw[1]), tonumber(raw[2]), tonumber(raw[3])
  m.snap, m.kl_step = tonumber(raw[4]), tonumber(raw[5]) or -1
  return m
end

local function check_token(m, token)
  if tonumber(token) ~= m.fencing_token then
    fail('FENCED', 'fencing token ' .. token .. ' is no longer valid, ' .. m.fencing_token .. ' is')
  end
end

local function now_ms()
  local t = call('TIME')
  return t[1] * 1000 + floor(t[2] / 1000)
end

-- Calls command(key, ...) with a long argument list in pieces that fit Lua's stack.
local function many(command, key, args)
  for first = 1, #args, 1000 do call(command, key, unpack(args, first, math.min(first + 999, #args))) end
end
