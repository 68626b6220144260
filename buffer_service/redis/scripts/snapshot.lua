-- ARGV: "begin" | "end", token (a number above 0). From begin to end the first write of a field keeps its old value in
-- snap:<hash>, so that the hashes can be read in small pages and still give the state of this moment. Begin returns the
-- small state as {name, contents} each; a later one takes the old values over. End returns whether they were still kept
-- for this token, and clears only those.
meta()
if ARGV[1] == 'end' and call('HGET', K('meta'), 'snap') ~= ARGV[2] then return 0 end
for _, hash in ipairs({ 'prompts', 'trajs', 'reuse', 'groups', 'tickets' }) do call('UNLINK', K('snap:' .. hash)) end
if ARGV[1] == 'end' then
  call('HSET', K('meta'), 'snap', 0)
  return 1
end
call('HSET', K('meta'), 'snap', ARGV[2])
local state, evals = {}, {}
for _, hash in ipairs({ 'meta', 'ledger', 'steps', 'rounds', 'quarantine', 'corrupt', 'facts' }) do
  state[#state + 1] = { hash, call('HGETALL', K(hash)) }
end
for _, round in ipairs(call('HKEYS', K('rounds'))) do
  evals[#evals + 1] = { round, call('HGETALL', K('eval:' .. round)) }
end
state[#state + 1] = { 'rounds:done', call('SMEMBERS', K('rounds:done')) }
state[#state + 1] = { 'fresh', call('ZRANGE', K('fresh'), 0, -1, 'WITHSCORES') }
state[#state + 1] = { 'seen', call('GET', K('seen')) or '' }
state[#state + 1] = { 'evals', evals }
return state
