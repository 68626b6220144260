-- ARGV: consumer. Its leases go back to the queue at once: it is known to be dead. Returns how many.
local m, given = meta(), 0
for _, tkey in ipairs(call('ZRANGE', K('leased'), 0, -1)) do
  local t = cmsgpack.unpack(call('HGET', K('tickets'), tkey))
  if t[10] == ARGV[1] then
    call('ZREM', K('leased'), tkey)
    if t[4] == 'train' and t[2] <= m.trained then del(m, 'tickets', tkey) else pend(tkey, t) end
    given = given + 1
  end
end
return given
