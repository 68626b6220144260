-- requires: requests
-- ARGV: request key, reason, detail, keep the prompt 0|1. The request is acknowledged as dropped; unless it is kept,
-- its prompt is never leased again. Returns 1, or 0 when the request was settled before.
local m, rkey = meta(), ARGV[1]
local r = load_request(rkey)
if not r then return 0 end
if ARGV[4] ~= '1' then
  tally('quarantine', call('HSETNX', K('quarantine'), r.prompt, ARGV[2] .. ': ' .. ARGV[3]))
end
drop_request(m, rkey, r)
if r.kind == 'eval' or r.step > m.trained then expect(r, -1) end
if r.kind == 'train' then drop_unanswered(r, ARGV[2]) end
return 1
