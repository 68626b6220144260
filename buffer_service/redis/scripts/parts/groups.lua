-- The state of a fresh group, in the hash `groups`; its trajectories are the values t:<gid>.<i>.
local function group(raw)
  local g = {}
  g.prompt, g.step, g.hinted, g.n, g.zero, g.successes, g.versions, g.advantages = unpack(cmsgpack.unpack(raw))
  return g
end

local function tid_of(gid, i) return gid .. '.' .. string.format('%d', i) end
