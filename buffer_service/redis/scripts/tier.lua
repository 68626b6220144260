-- ARGV: prompt id. Its tier's name by the present thresholds.
local rbar = call('ZSCORE', K('rank'), ARGV[1])
if not rbar then return false end
return ({ 'hard', 'medium', 'easy' })[tier_of(thresholds(meta()), tonumber(rbar))]
