-- requires: requests
-- ARGV: request key, payload. Stores one evaluation result and acknowledges its request; 0 when it was settled before.
local m, r = meta(), load_request(ARGV[1])
if not r then return 0 end
if r.kind ~= 'eval' then fail('UNKNOWN', 'request ' .. ARGV[1] .. ' is not an evaluation request') end
call('HSET', K('eval:' .. r.round), r.seq, ARGV[2])
drop_request(m, ARGV[1], r)
return 1
