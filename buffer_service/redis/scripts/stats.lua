-- Everything the telemetry shows, as one JSON text.
local m = meta()
local q = thresholds(m)
local seg, ledger = segments(q), {}
local raw = call('HGETALL', K('ledger'))
for i = 1, #raw, 2 do ledger[raw[i]] = tonumber(raw[i + 1]) end
local function size(t) return seg[t].f[2] + seg[t].s[2] end
local out = {
  version = m.version, trained = m.trained, epoch = m.epoch, prompts = call('ZCARD', K('rank')),
  rbar_sum = call('HGET', K('meta'), 'rbar_sum'), q_low = q and string.format('%.17g', q[1]) or cjson.null,
  q_high = q and string.format('%.17g', q[2]) or cjson.null,
  hard = size(1), medium = size(2), easy = size(3), successes = seg[1].s[2] + seg[2].s[2] + seg[3].s[2],
  hard_successes = seg[1].s[2],
  stock = call('ZCARD', K('stock:v')), pending_train = call('ZCARD', K('pend:t')),
  pending_eval = call('ZCARD', K('pend:e')), leased = call('ZCARD', K('leased')), fresh = call('ZCARD', K('fresh')),
  quarantined_prompts = call('HLEN', K('quarantine')), quarantined_records = call('HLEN', K('corrupt')),
  hints_on = call('SCARD', K('hints')), kl = m.kl or cjson.null, ledger = ledger,
}
return cjson.encode(out)
