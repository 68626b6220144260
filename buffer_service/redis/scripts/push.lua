-- ARGV: packed tickets {tkey, pid, step, epoch, kind, round, n, min_version, seq}. Returns how many were new.
local m, new = meta(), 0
for _, raw in ipairs(ARGV) do
  local a = cmsgpack.unpack(raw)
  local tkey, eval = a[1], a[5] == 'eval'
  local known = call('HEXISTS', K('tickets'), tkey) == 1
  if eval then
    known = known or call('HEXISTS', K('eval:' .. a[6]), a[9]) == 1 or call('SISMEMBER', K('rounds:done'), a[6]) == 1
  else
    known = known or a[3] <= m.trained or call('GETBIT', K('seen'), a[9]) == 1
  end
  if not known then
    local t = { a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], 0, '' }
    put(m, 'tickets', tkey, cmsgpack.pack(t))
    pend(tkey, t)
    call('HINCRBY', K(eval and 'rounds' or 'steps'), eval and a[6] or a[3], 1)
    new = new + 1
  end
end
return new
