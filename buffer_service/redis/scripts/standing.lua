-- requires: tiers prompts
-- ARGV: prompts. The tier of each by its place (parts/prompts.lua); 0 for one that was never scored.
local q, found = thresholds(meta()), {}
for i = 1, #ARGV do
  local raw = q and call('HGET', K('prompts'), ARGV[i])
  local at = raw and place_of(unpack_prompt(raw))
  found[i] = not at and 0 or at <= q.low and HARD or at <= q.high and MEDIUM or EASY
end
return found
