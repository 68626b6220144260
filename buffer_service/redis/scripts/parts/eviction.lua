-- requires: tiers stock
local SCAN = 128 -- fewest entries looked at at once in an age bin that a threshold cuts

-- The `need` oldest members of one kind in the score range (low, high]; oldest = lowest seq.
local function oldest(kind, low, high, need)
  local key, found = K('stock:' .. kind), {}
  local from, to = low and '(' .. string.format('%.17g', low) or '-inf', high or '+inf'
  local least = call('ZRANGEBYSCORE', key, from, to, 'WITHSCORES', 'LIMIT', 0, 1)
  if #least == 0 then return found end
  local most = call('ZREVRANGEBYSCORE', key, to, from, 'WITHSCORES', 'LIMIT', 0, 1)
  for bin = bin_of(tonumber(least[2])), bin_of(tonumber(most[2])) do
    local cut = (low and bin == bin_of(low)) or (high and bin == bin_of(high)) or bin == 64 or bin == -64
    local page, first, before = cut and math.max(need, SCAN) or need, 0, #found
    repeat -- pages, for the oldest of a cut bin may all be of another tier
      local members = call('ZRANGE', age_key(kind, bin), first, first + page - 1)
      if cut and #members > 0 then
        local scores = call('ZMSCORE', key, unpack(members))
        for i, tid in ipairs(members) do
          local s = tonumber(scores[i])
          if (not low or s > low) and (not high or s <= high) then found[#found + 1] = tid end
        end
      else
        for _, tid in ipairs(members) do found[#found + 1] = tid end
      end
      first = first + page
    until #found - before >= need or #members < page
  end
  table.sort(found, function(a, b)
    local x, y = tonumber(string.sub(a, 1, 8)), tonumber(string.sub(b, 1, 8))
    if x ~= y then return x < y end
    return string.sub(a, 10) < string.sub(b, 10)
  end)
  for i = #found, need + 1, -1 do found[i] = nil end
  return found
end

-- Brings every tier under its capacity, at most REPAIR removals more in each than the call has `added` to the stock, so
-- that it never grows beyond and a lowered capacity holds nobody up. Returns how many went.
local function evict(m, q, added)
  local seg, gone = segments(q), 0
  local tiers = {
    { seg = seg[HARD], capacity = m.cap_hard, high = q.low },
    { seg = seg[MEDIUM], capacity = m.cap_medium, low = q.low, high = q.high },
    { seg = seg[EASY], capacity = m.cap_easy, low = q.high },
  }
  for _, tier in ipairs(tiers) do
    local need = math.min(tier.seg.f.size + tier.seg.s.size - tier.capacity, REPAIR + added)
    for _, kind in ipairs(KINDS) do
      local left = math.min(need, tier.seg[kind].size)
      need = need - left
      while left > 0 do
        local victims = oldest(kind, tier.low, tier.high, math.min(left, REPAIR))
        for _, tid in ipairs(victims) do stock_remove(m, tid) end
        left, gone = #victims > 0 and left - #victims or 0, gone + #victims
      end
    end
  end
  if gone > 0 then count('evicted', gone) end
  return gone
end
