-- requires: tiers books
-- Everything the telemetry shows, as one JSON text.
local m = meta()
local q = thresholds(m)
local seg, ledger = segments(q), {}
local raw = call('HGETALL', K('ledger'))
for i = 1, #raw, 2 do ledger[raw[i]] = tonumber(raw[i + 1]) end
local function size(tier) return seg[tier].f.size + seg[tier].s.size end
local function exact(x) return q and x > -math.huge and string.format('%.17g', x) or cjson.null end
return cjson.encode({
  version = m.version, trained_step = m.trained, fencing_token = m.fencing_token, prompts = call('ZCARD', K('rank')),
  rbar_sum = call('HGET', K('meta'), 'rbar_sum'),
  threshold_low = exact(q and q.low), threshold_high = exact(q and q.high),
  tiers = { hard = size(HARD), medium = size(MEDIUM), easy = size(EASY) },
  successes = seg[HARD].s.size + seg[MEDIUM].s.size + seg[EASY].s.size,
  stock = call('ZCARD', K('stock:v')), pending_train = call('ZCARD', K('pend:t')),
  pending_eval = call('ZCARD', K('pend:e')), leased = call('ZCARD', K('leased')), fresh = call('ZCARD', K('fresh')),
  quarantined_prompts = call('HLEN', K('quarantine')), quarantined_records = call('HLEN', K('corrupt')),
  hints_on = call('SCARD', K('hints')), ledger = ledger,
  faults = table.concat(faults_of_counts(), '; '),
})
