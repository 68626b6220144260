-- requires: requests
-- ARGV: key and packed request, by turns. Returns how many were new.
local m, new = meta(), 0

local function known(rkey, r)
  if call('HEXISTS', K('tickets'), rkey) == 1 then return true end
  if r.kind == 'eval' then
    return call('HEXISTS', K('eval:' .. r.round), r.seq) == 1 or call('SISMEMBER', K('rounds:done'), r.round) == 1
  end
  return r.step <= m.trained or call('GETBIT', K('seen'), r.seq) == 1
end

for i = 1, #ARGV, 2 do
  local rkey, r = ARGV[i], request(ARGV[i + 1])
  if not known(rkey, r) then
    put(m, 'tickets', rkey, ARGV[i + 1])
    pend(rkey, r)
    expect(r, 1)
    new = new + 1
  end
end
return new
