-- What must agree at any moment: counts of keys that are written together. A difference means that keys were removed or
-- edited from outside.

-- What differs, a text each. O(1), but for the bits of `seen`.
local function faults_of_counts()
  local found = {}
  local function same(what, a, b)
    if a ~= b then found[#found + 1] = string.format('%s: %d against %d', what, a, b) end
  end
  local function counted(name) return tonumber(call('HGET', K('ledger'), name)) or 0 end
  local stock = call('ZCARD', K('stock:v'))
  same('groups in the ledger, settled seqs', counted('generated'), call('BITCOUNT', K('seen')))
  same('stored trajectories, their failures and successes', stock,
    call('ZCARD', K('stock:f')) + call('ZCARD', K('stock:s')))
  same('stored trajectories, their states', stock, call('HLEN', K('trajs')))
  same('prompts with a rank, their statistics', call('ZCARD', K('rank')), call('HLEN', K('prompts')))
  same('fresh groups, their states', call('ZCARD', K('fresh')), call('HLEN', K('groups')))
  same('requests that wait or are leased, their states',
    call('ZCARD', K('pend:t')) + call('ZCARD', K('pend:e')) + call('ZCARD', K('leased')), call('HLEN', K('tickets')))
  same('hints that are on, fired and not released', call('SCARD', K('hints')),
    counted('hints_fired') - counted('hints_released'))
  for _, hash in ipairs({ 'quarantine', 'facts', 'reuse', 'drawn' }) do
    local n = tonumber(call('HGET', K('meta'), 'n_' .. hash)) -- none in a run of an older release
    if n then same('entries of ' .. hash .. ', written and there', n, call('HLEN', K(hash))) end
  end
  return found
end
