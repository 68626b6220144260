-- A tier is a score range: `stock:f` and `stock:s` hold the replayable failures and successes scored by their prompt's
-- Rbar. Nothing moves when only the thresholds do (docs/method.md 1.3).
local HARD, MEDIUM, EASY = 1, 2, 3
local KINDS = { 'f', 's' }

-- Lower order statistics {low, high} of all prompts seen; nil before the first prompt.
local function thresholds(m)
  local n = call('ZCARD', K('rank'))
  if n == 0 then return nil end
  local function at(q)
    local i = floor(q * (n - 1))
    return tonumber(call('ZRANGE', K('rank'), i, i, 'WITHSCORES')[2])
  end
  return { low = at(m.q_low), high = at(m.q_high) }
end

-- segments(q)[tier][kind] = {first, size}: a range of ranks in stock:kind.
local function segments(q)
  local seg = { {}, {}, {} }
  for _, kind in ipairs(KINDS) do
    local low = q and call('ZCOUNT', K('stock:' .. kind), '-inf', q.low) or 0
    local high = q and call('ZCOUNT', K('stock:' .. kind), '-inf', q.high) or 0
    local all = call('ZCARD', K('stock:' .. kind))
    seg[HARD][kind] = { first = 0, size = low }
    seg[MEDIUM][kind] = { first = low, size = high - low }
    seg[EASY][kind] = { first = high, size = all - high }
  end
  return seg
end
