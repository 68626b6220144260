-- requires: snapshot
-- Rollout requests, in the hash `tickets`. One waits in `pend:t` (train) or `pend:e` (eval), or is in `leased`.
local function request(raw)
  local v = cmsgpack.unpack(raw)
  return {
    prompt = v[1], step = v[2], epoch = v[3], kind = v[4], round = v[5], n = v[6], min_version = v[7], seq = v[8],
    attempt = v[9], consumer = v[10], spares = v[11] or {}, -- no spares of an older release
  }
end

local function packed_request(r)
  return cmsgpack.pack({
    r.prompt, r.step, r.epoch, r.kind, r.round, r.n, r.min_version, r.seq, r.attempt, r.consumer, r.spares,
  })
end

local function load_request(rkey)
  local raw = call('HGET', K('tickets'), rkey)
  return raw and request(raw)
end

local function pend(rkey, r)
  if r.kind == 'eval' then call('ZADD', K('pend:e'), r.min_version, rkey)
  else call('ZADD', K('pend:t'), r.step * STEP + r.seq, rkey) end
end
local function unpend(rkey, r) call('ZREM', K(r.kind == 'eval' and 'pend:e' or 'pend:t'), rkey) end

-- Asks the next spare prompt of a request that was answered, under the next seq.
local function ask_spare(m, r)
  r.prompt, r.seq, r.attempt, r.consumer = table.remove(r.spares, 1), r.seq + 1, 0, ''
  local rkey = string.format('t:%08d', r.seq)
  put(m, 'tickets', rkey, packed_request(r))
  pend(rkey, r)
  call('HINCRBY', K('steps'), r.step, 1)
  count('replaced', 1)
end

local function drop_request(m, rkey, r)
  if call('ZREM', K('leased'), rkey) == 0 then unpend(rkey, r) end
  del(m, 'tickets', rkey)
end

-- Groups that the request's step, or results that its round, still waits for.
local function expect(r, n)
  if r.kind == 'eval' then call('HINCRBY', K('rounds'), r.round, n)
  else call('HINCRBY', K('steps'), r.step, n) end
end

-- A train request that ends without a group: its seq is settled, and the books count it as dropped.
local function drop_unanswered(r, reason)
  call('SETBIT', K('seen'), r.seq, 1)
  count('generated', 1)
  count('dropped:' .. reason, 1)
end

-- Ends a lease: the request waits again, unless its step has passed.
local function give_back(m, rkey, r)
  call('ZREM', K('leased'), rkey)
  if r.kind == 'train' and r.step <= m.trained then del(m, 'tickets', rkey) else pend(rkey, r) end
end
