-- requires: requests
-- ARGV: "renew" | "release", lease ms, then request key and attempt per lease. Returns the keys that were still held.
local m, held = meta(), {}
local expiry = now_ms() + tonumber(ARGV[2])
for i = 3, #ARGV, 2 do
  local rkey = ARGV[i]
  local r = load_request(rkey)
  if r and r.attempt == tonumber(ARGV[i + 1]) and call('ZSCORE', K('leased'), rkey) then
    held[#held + 1] = rkey
    if ARGV[1] == 'renew' then call('ZADD', K('leased'), expiry, rkey) else give_back(m, rkey, r) end
  end
end
return held
