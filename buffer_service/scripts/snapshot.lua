-- ARGV: "begin" | "end". From begin to end the first write of a field keeps the field's old value in snap:<hash>, so that
-- the hashes can be read in small pages and still give the state of this moment. Begin returns the small state.
for _, hash in ipairs({ 'prompts', 'trajs', 'reuse', 'groups', 'tickets' }) do call('UNLINK', K('snap:' .. hash)) end
meta()
if ARGV[1] == 'end' then
  call('HSET', K('meta'), 'snap', 0)
  return {}
end
call('HSET', K('meta'), 'snap', 1)
local evals = {}
for _, round in ipairs(call('HKEYS', K('rounds'))) do evals[#evals + 1] = { round, call('HGETALL', K('eval:' .. round)) } end
return { call('HGETALL', K('meta')), call('HGETALL', K('ledger')), call('HGETALL', K('steps')), call('HGETALL', K('rounds')),
  call('SMEMBERS', K('rounds:done')), call('HGETALL', K('quarantine')), call('HGETALL', K('corrupt')),
  call('HGETALL', K('facts')), call('ZRANGE', K('fresh'), 0, -1, 'WITHSCORES'), call('GET', K('seen')) or '', evals }
