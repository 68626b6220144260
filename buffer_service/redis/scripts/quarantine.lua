-- ARGV: tkey, reason, detail, keep. The ticket is acknowledged as dropped; unless keep is 1 its prompt is never leased
-- again. Returns 1, or 0 when the ticket was settled before.
local m, tkey = meta(), ARGV[1]
local raw = call('HGET', K('tickets'), tkey)
if not raw then return 0 end
local t = cmsgpack.unpack(raw)
if ARGV[4] ~= '1' then call('HSETNX', K('quarantine'), t[1], ARGV[2] .. ': ' .. ARGV[3]) end
drop_ticket(m, tkey, t)
if t[4] == 'eval' then
  call('HINCRBY', K('rounds'), t[5], -1)
else
  if t[2] > m.trained then call('HINCRBY', K('steps'), t[2], -1) end
  call('SETBIT', K('seen'), t[8], 1)
  count('generated', 1)
  count('dropped:' .. ARGV[2], 1)
end
return 1
