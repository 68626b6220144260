-- requires: requests hints
-- ARGV: consumer, count, lease ms, max staleness, nonce, completions at most (0: any). Returns {key, packed request,
-- hinted} per lease. A repeat with the same nonce (a lost reply) gets the same leases back.
local m, now = meta(), now_ms()
local consumer, want, lease_ms, bound, nonce = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local budget, full = tonumber(ARGV[6]), false
local limited = ARGV[6] ~= '0'
local out, names = {}, {}

-- The leases that the last call of this consumer gave, those it still holds.
local function repeated(said)
  for i = 2, #said do
    local rkey, attempt, hint = unpack(said[i])
    local raw = call('HGET', K('tickets'), rkey)
    if raw and request(raw).attempt == attempt then out[#out + 1] = { rkey, raw, hint } end
  end
  return out
end

local last = call('HGET', K('lastlease'), consumer)
local said = last and cmsgpack.unpack(last)
if said and said[1] == nonce then return repeated(said) end

local function take(rkey)
  local r = load_request(rkey)
  if full or r.min_version > m.version then return end
  if call('HEXISTS', K('quarantine'), r.prompt) == 1 then
    drop_request(m, rkey, r)
    expect(r, -1)
    if r.kind == 'train' then drop_unanswered(r, 'quarantined_prompt') end
    return
  end
  if limited then
    full = r.n > budget -- a smaller request behind does not overtake: it could do so for ever
    if full then return end
    budget = budget - r.n
  end
  r.attempt, r.consumer = r.attempt + 1, consumer
  local raw = packed_request(r)
  put(m, 'tickets', rkey, raw)
  unpend(rkey, r)
  call('ZADD', K('leased'), now + lease_ms, rkey)
  local hint = hint_for(m, r)
  out[#out + 1] = { rkey, raw, hint }
  names[#names + 1] = { rkey, r.attempt, hint }
end

-- Expired leases first: their requests go back to the queue, lowest seq first by the queue's order.
local expired = call('ZRANGEBYSCORE', K('leased'), '-inf', now, 'LIMIT', 0, REPAIR)
for _, rkey in ipairs(expired) do give_back(m, rkey, load_request(rkey)) end
if #expired > 0 then count('leases_expired', #expired) end

for _, rkey in ipairs(call('ZRANGEBYSCORE', K('pend:e'), '-inf', m.version, 'LIMIT', 0, want)) do take(rkey) end
local last_score, page = '(' .. (m.version + bound + 1) * STEP, 0
while #out < want and not full do -- pages, for requests that wait for a later version are passed over
  local keys = call('ZRANGEBYSCORE', K('pend:t'), '-inf', last_score, 'LIMIT', page, want)
  if #keys == 0 then break end
  local before = call('ZCARD', K('pend:t'))
  for _, rkey in ipairs(keys) do
    if #out < want then take(rkey) end
  end
  page = page + #keys - (before - call('ZCARD', K('pend:t')))
end
call('HSET', K('lastlease'), consumer, cmsgpack.pack({ nonce, unpack(names) }))
return out
