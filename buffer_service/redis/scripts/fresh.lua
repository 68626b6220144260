-- ARGV: consumer, step, rank, world, lease ms, epoch (-1: unchecked). Returns {expected, arrived, gid, n, gid, n, ...}: the
-- groups of this rank's share in seq order once the whole step has arrived.
local m, now = meta(), now_ms()
local step, rank, world, epoch = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])
if epoch >= 0 and epoch ~= m.epoch then fail('FENCED', 'epoch ' .. ARGV[6] .. ' is over, ' .. m.epoch .. ' has begun') end
if step <= m.trained then fail('TRAINED', 'step ' .. ARGV[2] .. ' is already trained') end
local expected = tonumber(call('HGET', K('steps'), step)) or -1
local gids = call('ZRANGEBYSCORE', K('fresh'), step * STEP, '(' .. (step + 1) * STEP)
local out = { expected, #gids }
if expected < 0 or #gids < expected then return out end
local field = ARGV[3] .. '/' .. ARGV[4]
local held = call('HGET', K('freshlease'), field)
if held then
  local h = cmsgpack.unpack(held)
  if h[1] ~= ARGV[1] and h[2] == step and h[3] > now then
    fail('HELD', 'share ' .. field .. ' of step ' .. ARGV[2] .. ' is leased to ' .. h[1] .. ' for ' .. (h[3] - now) .. ' ms more')
  end
end
call('HSET', K('freshlease'), field, cmsgpack.pack({ ARGV[1], step, now + tonumber(ARGV[5]) }))
for i, gid in ipairs(gids) do
  if (i - 1) % world == rank then
    out[#out + 1] = gid
    out[#out + 1] = cmsgpack.unpack(call('HGET', K('groups'), gid))[4]
  end
end
return out
