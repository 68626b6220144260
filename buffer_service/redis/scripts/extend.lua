-- ARGV: "renew" | "release", lease ms, then tkey and attempt per lease. Returns the tkeys that were still held.
local m, held = meta(), {}
local expiry = now_ms() + tonumber(ARGV[2])
for i = 3, #ARGV, 2 do
  local tkey = ARGV[i]
  local raw = call('HGET', K('tickets'), tkey)
  local t = raw and cmsgpack.unpack(raw)
  if t and t[9] == tonumber(ARGV[i + 1]) and call('ZSCORE', K('leased'), tkey) then
    held[#held + 1] = tkey
    if ARGV[1] == 'renew' then
      call('ZADD', K('leased'), expiry, tkey)
    else
      call('ZREM', K('leased'), tkey)
      if t[4] == 'train' and t[2] <= m.trained then del(m, 'tickets', tkey) else pend(tkey, t) end
    end
  end
end
return held
