-- requires: groups
-- ARGV: consumer, step, rank, world, lease ms, fencing token or UNCHECKED. Returns {expected, arrived, gid, n, gid, n,
-- ...}: the groups of this rank's share in seq order once the whole step has arrived.
local m, now = meta(), now_ms()
local step, rank, world = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if tonumber(ARGV[6]) ~= UNCHECKED then check_token(m, ARGV[6]) end
if step <= m.trained then fail('TRAINED', 'step ' .. ARGV[2] .. ' is already trained') end
local expected = tonumber(call('HGET', K('steps'), step)) or -1
local gids = call('ZRANGEBYSCORE', K('fresh'), step * STEP, '(' .. (step + 1) * STEP)
local out = { expected, #gids }
if expected < 0 or #gids < expected then return out end
local field = ARGV[3] .. '/' .. ARGV[4]
local held = call('HGET', K('freshlease'), field)
if held then
  local holder, of_step, expiry = unpack(cmsgpack.unpack(held))
  if holder ~= ARGV[1] and of_step == step and expiry > now then
    local share, left = field .. ' of step ' .. ARGV[2], expiry - now
    fail('HELD', 'share ' .. share .. ' is leased to ' .. holder .. ' for ' .. left .. ' ms more')
  end
end
call('HSET', K('freshlease'), field, cmsgpack.pack({ ARGV[1], step, now + tonumber(ARGV[5]) }))
for i, gid in ipairs(gids) do
  if (i - 1) % world == rank then
    out[#out + 1] = gid
    out[#out + 1] = group(call('HGET', K('groups'), gid)).n
  end
end
return out
