-- ARGV: name, value. Stores a value of the run. Returns whether the name is new.
local new = call('HSET', K('facts'), ARGV[1], ARGV[2])
tally('facts', new)
return new
