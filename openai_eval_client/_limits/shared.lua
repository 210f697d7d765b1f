-- The limits of one model, shared by all workers: one atomic step takes a worker's updates and reserves for
-- its waiters.
--
-- Each dimension (1 requests, 2 tokens) is a quota. `reserved` counts all that was ever reserved in it. Each
-- of its two buckets, the configured and the server's, has `released` some of that so far, or up to `size`
-- more. A reservation that ends at position p may go once both have released p. When that is follows from
-- `released` and `rate`, which the reply holds: no worker asks twice, and a change moves all positions.
--
-- KEYS: the state; the workers and when each sent its latest message.
-- ARGV: the message, in JSON (shared.py). shared.py puts the constants in front, those of buckets.py and its own.

local message = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = message.now or time[1] + time[2] / 1e6

-- `peaks` notes what had been reserved when the bucket was last so full, in sixteenths.
local STEPS = 16

local function new_bucket(rate, size, released)
  return { rate = rate, size = size, released = released, peaks = {} }
end

local function new_quota(rate, size)
  local quota = {
    reserved = 0, sent = 0, cancelled = {}, lowest_until = 0,
    configured = new_bucket(rate, size, size),
    stated = false, newest = 0, stated_at = now, served = 0,
    cut_at = 0, cut_reserved = 0, cut_served = 0, cut_rate = 0, first_cut = 0,
    busy_from = now, busy_reserved = 0, last = now,
  }
  if message.adaptive and rate < UNLIMITED then
    local first = math.max(math.min(rate * FIRST_SECONDS, size), 1)
    quota.server = new_bucket(rate, first, first)
  end
  return quota
end

local function buckets(quota)
  return { quota.configured, quota.server }
end

local function add(quota, bucket, amount)
  if not bucket then return end
  bucket.released = math.min(bucket.released + amount, quota.reserved + bucket.size)
  local steps = math.ceil((bucket.released - quota.reserved) / bucket.size * STEPS)
  for step = 1, steps do bucket.peaks[step] = quota.reserved end
end

-- Gives back what was cancelled, but for what would have overflowed since then had it not been reserved.
local function refund(quota, bucket, cancelled)
  local peak = 0
  for step, reserved in ipairs(bucket.peaks) do
    if reserved > cancelled.position then peak = step end
  end
  add(quota, bucket, math.min(cancelled.amount, bucket.size * (1 - peak / STEPS)))
end

local function released(quota)
  local server = quota.server and quota.server.released or quota.reserved
  return math.min(quota.reserved, quota.configured.released, server)
end

-- Notes what has been sent by now: all that is released, but nothing during a pause. A cancelled reservation
-- is given back when its position is released, not before: those ahead of it must not go sooner.
local function note_sent(state)
  for _, quota in ipairs(state.quotas) do
    local ahead = {}
    for _, cancelled in ipairs(quota.cancelled) do
      if cancelled.position > released(quota) then
        ahead[#ahead + 1] = cancelled
      else
        for _, bucket in ipairs(buckets(quota)) do refund(quota, bucket, cancelled) end
      end
    end
    quota.cancelled = ahead
    if now >= state.pause then quota.sent = math.max(quota.sent, released(quota)) end
  end
end

-- The lowest of the limits that live workers have configured holds: each message of its worker renews it, and
-- another raises it when none has for a while.
local function configure(quota, rate, size)
  local configured = quota.configured
  if rate <= configured.rate or now >= quota.lowest_until then
    configured.rate, configured.size = rate, size
    add(quota, configured, 0)
    quota.lowest_until = now + ALIVE_SECONDS
  end
end

-- Takes over the headers of the answer to the newest request: the two readings are those of buckets.py.
local function update_from_headers(quota, stated)
  local at = now - stated.age
  if at < quota.newest then return end
  local before = quota.server
  -- Which of those that were sent together at first, or after a pause, arrived before it is unknown: none
  -- counts. A late answer from before the pause keeps its position.
  local together = at < quota.busy_from + TRANSIT
  local position = together and math.min(quota.busy_reserved, stated.position) or stated.position
  local free = math.min(quota.sent, position + stated.rate * stated.age) + stated.left
  free = math.max(free, quota.sent) - stated.rate * TRANSIT
  if quota.stated and before and free > before.released then
    free = before.released + (free - before.released) * (1 - math.exp(-(now - quota.stated_at) / SMOOTHING))
  end
  quota.server = new_bucket(stated.rate, stated.size, free)
  add(quota, quota.server, 0)
  quota.stated, quota.newest, quota.stated_at = true, at, now
end

-- Without headers: before the first refusal a success makes room for more, after it the rate recovers.
local function on_success(quota, amount)
  quota.served = quota.served + amount
  local server, most = quota.server, quota.configured.rate
  if quota.stated or not server then return end
  if quota.cut_at == 0 then
    local room = math.max(math.min(GROWTH * amount, quota.configured.size - server.size), 0)
    server.size, server.released = server.size + room, server.released + room
    return
  end
  local seconds = now - quota.cut_at
  local rate = most < UNLIMITED and math.min(quota.cut_rate + RECOVERY * most * seconds, most)
    or quota.cut_rate * (1 + UNBOUNDED_RECOVERY) ^ math.min(seconds, 1000)
  if rate > server.rate * (1 + RECOVERY / 2) then server.rate = rate end
end

-- Without headers: lowers the rate, once for all whose position was reserved before it was lowered last.
local function slow_down(quota, amount, position)
  local server, rate = quota.server, nil
  if not server or (quota.configured.rate >= UNLIMITED and position <= quota.first_cut) then
    local seconds = math.max(now - quota.busy_from, 1)
    rate = math.max(CUT * (quota.reserved - quota.busy_reserved) / seconds, amount)
    if server then rate = math.min(rate, server.rate) else quota.first_cut = quota.reserved end
  elseif position > quota.cut_reserved then
    local seconds = now - quota.cut_at
    rate = server.rate * CUT
    if seconds >= MEASURED_SECONDS and quota.cut_at >= quota.busy_from then
      local measured = (quota.served - quota.cut_served) / seconds
      rate = math.min(math.max(measured, server.rate * CUT ^ 2), server.rate)
    end
  else
    return
  end
  quota.server = new_bucket(rate, server and server.size or math.max(rate, 1), quota.sent)
  quota.cut_at, quota.cut_reserved, quota.cut_served, quota.cut_rate = now, quota.reserved, quota.served, rate
end

-- After the wait there is room for the refused request, and the refill paces the rest.
local function refused(quota, refusal)
  if refusal.amount <= 0 then return end
  quota.stated = quota.stated and refusal.stated
  if message.adaptive and not quota.stated then
    add(quota, quota.server, refusal.amount)
    slow_down(quota, refusal.amount, refusal.position)
  end
  local bucket = message.adaptive and quota.server or quota.configured
  bucket.released = math.min(bucket.released, quota.sent + refusal.amount - refusal.wait * bucket.rate)
end

-- `lost`: the worker's positions are those of a state that is no more.
local function take_updates(state, lost)
  for i, quota in ipairs(state.quotas) do
    if message.spent and not lost then
      for _, bucket in ipairs(buckets(quota)) do bucket.released = bucket.released - message.spent[i] end
    end
    for _, cancelled in ipairs(lost and {} or message.cancelled) do
      local entry = { position = cancelled[i], amount = i == 1 and 1 or cancelled[3] }
      if entry.position < quota.reserved then table.insert(quota.cancelled, entry) end
    end
    if message.credit then add(quota, quota.configured, message.credit[i]) end
    if message.debt and not quota.stated then add(quota, quota.server, -message.debt[i]) end
    if message.served then on_success(quota, message.served[i]) end
  end
  for _, refusal in ipairs(message.refusals) do refused(state.quotas[refusal.quota], refusal) end
  for _, stated in ipairs(message.stated) do update_from_headers(state.quotas[stated.quota], stated) end
  state.pause = math.max(state.pause, now + message.pause)
end

local function wait_for(state, amounts)
  local wait = state.pause - now
  for i, quota in ipairs(state.quotas) do
    for _, bucket in ipairs({ quota.configured, message.adaptive and quota.server or nil }) do
      local missing = quota.reserved + math.min(amounts[i], bucket.size) - bucket.released
      if missing > bucket.size * ROUNDING then wait = math.max(wait, missing / bucket.rate) end
    end
  end
  return wait
end

-- Reserves for all that can go now, and for the first that has to wait, and returns how many these are. A
-- worker waits for one at a time, so workers take turns.
local function reserve(state)
  for count, tokens in ipairs(message.wanted) do
    local amounts = { 1, tokens }
    local wait = wait_for(state, amounts)
    for i, quota in ipairs(state.quotas) do
      if now - quota.last > IDLE_SECONDS then quota.busy_from, quota.busy_reserved = now, quota.reserved end
      quota.last, quota.reserved = now, quota.reserved + amounts[i]
    end
    if wait > 0 then return count end
  end
  return #message.wanted
end

local packed = redis.call('GET', KEYS[1])
local state = packed and cmsgpack.unpack(packed)
local lost = message.epoch ~= 0 and not (state and state.epoch == message.epoch)
if not state then
  state = { epoch = now, at = now, ahead = 0, pause = 0, quotas = {} }
  for i = 1, 2 do state.quotas[i] = new_quota(message.rates[i], message.sizes[i]) end
end
now = now + state.ahead
if now < state.at then -- Redis's clock was set back: go on from where it was
  state.ahead, now = state.ahead + state.at - now, state.at
end
for _, quota in ipairs(state.quotas) do
  for _, bucket in ipairs(buckets(quota)) do add(quota, bucket, bucket.rate * (now - state.at)) end
end
state.at = now
note_sent(state)
for i, quota in ipairs(state.quotas) do configure(quota, message.rates[i], message.sizes[i]) end
if lost and not state.inherited then -- there was spending that this state does not know of: begin empty
  state.inherited = true
  for _, quota in ipairs(state.quotas) do
    for _, bucket in ipairs(buckets(quota)) do bucket.released = math.min(bucket.released, quota.reserved) end
  end
end
take_updates(state, lost)
note_sent(state)
local starts = { state.quotas[1].reserved, state.quotas[2].reserved }
local reserved = reserve(state)
note_sent(state)
redis.call('SET', KEYS[1], cmsgpack.pack(state), 'EX', message.expire)

redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - ALIVE_SECONDS)
redis.call('ZADD', KEYS[2], now, message.worker)
if message.leaving then redis.call('ZREM', KEYS[2], message.worker) end
redis.call('EXPIRE', KEYS[2], message.expire)

local workers = redis.call('ZCARD', KEYS[2])
local reply = { state.epoch, now - state.epoch, workers, reserved, state.pause - now }
for i, quota in ipairs(state.quotas) do
  reply[#reply + 1] = starts[i]
  for _, bucket in ipairs({ quota.configured, message.adaptive and quota.server or quota.configured }) do
    for _, number in ipairs({ bucket.released, bucket.rate, bucket.size }) do reply[#reply + 1] = number end
  end
  reply[#reply + 1] = quota.stated and 1 or 0
end
for i, number in ipairs(reply) do reply[i] = string.format('%.17g', number) end
return reply
