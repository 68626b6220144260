-- Combined multiplicative generator of L'Ecuyer (1988): every product stays below 2^53, so Python repeats it exactly
-- (tests/reference_buffer.py).
local function generator(x, y)
  return function(n) -- uniform integer in [0, n)
    x, y = (x * 40014) % 2147483563, (y * 40692) % 2147483399
    local z = (x - y) % 2147483562 * n / 2147483562
    return z - z % 1 -- its floor, without a call
  end
end
