-- requires: stock
-- A tier is a score range: `stock:f` and `stock:s` hold the replayable failures and successes scored by their prompt's
-- place (parts/prompts.lua). Nothing moves when only the thresholds do (docs/method.md 1.3).
local HARD, MEDIUM, EASY = 1, 2, 3

-- {low, high}: the largest Rbar of a prompt that is Hard, and of one that is Medium, by its mid-rank (below + equal / 2)
-- / n; -inf where none is. nil before the first prompt.
local function thresholds(m)
  local n = call('ZCARD', K('rank'))
  if n == 0 then return nil end
  local function at(q)
    local i = math.min(floor(q * n), n - 1)
    local rbar = call('ZRANGE', K('rank'), i, i, 'WITHSCORES')[2]
    local below, upto = call('ZCOUNT', K('rank'), '-inf', '(' .. rbar), call('ZCOUNT', K('rank'), '-inf', rbar)
    if (below + (upto - below) / 2) / n <= q then return tonumber(rbar) end
    -- Whoever stands below has a mid-rank of at most i / n.
    return below > 0 and tonumber(call('ZRANGE', K('rank'), below - 1, below - 1, 'WITHSCORES')[2]) or -math.huge
  end
  return { low = at(m.q_low), high = at(m.q_high) }
end

-- segments(q)[tier][kind] = {first, size}: a range of ranks in stock:kind.
local function segments(q)
  local seg = { {}, {}, {} }
  for _, kind in ipairs(KINDS) do
    local low = q and call('ZCOUNT', K('stock:' .. kind), '-inf', string.format('%.17g', q.low)) or 0
    local high = q and call('ZCOUNT', K('stock:' .. kind), '-inf', string.format('%.17g', q.high)) or 0
    local all = call('ZCARD', K('stock:' .. kind))
    seg[HARD][kind] = { first = 0, size = low }
    seg[MEDIUM][kind] = { first = low, size = high - low }
    seg[EASY][kind] = { first = high, size = all - high }
  end
  return seg
end
