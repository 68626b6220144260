-- Writes to the five hashes of a snapshot: while one is read, the first write to a field keeps the old value.
local function keep(m, hash, field)
  if m.snap > 0 then call('HSETNX', K('snap:' .. hash), field, call('HGET', K(hash), field) or '') end
end
local function put(m, hash, field, value)
  keep(m, hash, field)
  call('HSET', K(hash), field, value)
end
local function del(m, hash, field)
  keep(m, hash, field)
  call('HDEL', K(hash), field)
end
