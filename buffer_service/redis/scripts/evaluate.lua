-- ARGV: tkey, payload. Stores one evaluation result and acknowledges its ticket; 0 when it was settled before.
local m = meta()
local raw = call('HGET', K('tickets'), ARGV[1])
if not raw then return 0 end
local t = cmsgpack.unpack(raw)
if t[4] ~= 'eval' then fail('UNKNOWN', 'ticket ' .. ARGV[1] .. ' is not an evaluation ticket') end
call('HSET', K('eval:' .. t[5]), t[8], ARGV[2])
drop_ticket(m, ARGV[1], t)
return 1
