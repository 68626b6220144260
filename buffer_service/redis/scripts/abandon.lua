-- requires: requests
-- ARGV: consumer. Its leases go back to the queue at once: it is known to be dead. Returns how many.
local m, given = meta(), 0
for _, rkey in ipairs(call('ZRANGE', K('leased'), 0, -1)) do
  local r = load_request(rkey)
  if r.consumer == ARGV[1] then
    give_back(m, rkey, r)
    given = given + 1
  end
end
return given
