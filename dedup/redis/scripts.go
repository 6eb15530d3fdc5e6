package redis

import "github.com/redis/rueidis"

// The scripts of the Ledger. All work on keys of one hash tag: see ledgerKeys.

// luaWrites begins the scripts that write. A Redis that is full lets a script write once
// it has run a command that frees, and the ledger must work then: what it writes is
// little, and the seal frees much.
const luaWrites = `
redis.call('HDEL', KEYS[1] .. ':', '')
`

const luaNow = `
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
`

// luaLost reports whether the ledger has lost data, by FLUSHALL or by going back to an older
// state, since the last heartbeat of the member me, at the time at. Then numbers of others may
// be missing until that member's next heartbeat writes them again. A member that has left
// sends no heartbeat; its name is empty here.
const luaLost = `
local function lost(members, me, at)
  return me ~= '' and (tonumber(redis.call('ZSCORE', members, me) or '') or -1) < tonumber(at)
end
`

// luaAnswers writes what a member has answered in an epoch: see answers. A more certain number
// that is there already stays, and so does a "?".
const luaAnswers = `
local function answered(key, m, n)
  local old = redis.call('HGET', key, 'm:' .. m)
  if not old or n == old .. '?' or string.sub(old, -1) == '+' and
    (string.sub(n, -1) ~= '+' or tonumber(string.sub(n, 1, -2)) > tonumber(string.sub(old, 1, -2))) then
    redis.call('HSET', key, 'm:' .. m, n)
  end
end
`

// luaDecision returns the decision on an epoch, as the reply of a script; nil: there is none. If
// only that its record is delivered is left, after a loss, the reply is "delivered".
const luaDecision = `
local function decision(key)
  local h = redis.call('HMGET', key, 'unique', 'complete', 'exact', 'sealed', 'under', 'why')
  if h[1] then return {'decided', h[1], h[2], h[3], h[4], h[5] or '0', h[6] or ''} end
  if redis.call('HEXISTS', key, 'delivered') == 1 then return {'delivered'} end
end
`

// beatScript is a heartbeat. It notes that the member is alive, and writes again what the member
// knows of its epochs: also the answers of others, and its own report. It takes the lead if no
// member has it, or gives it away. It answers five lists:
//
//   - the time; whether the member leads; a member that keeps it outside of the group; one that
//     it keeps outside; whether the ledger has lost data since the member's last heartbeat; and
//     the last heartbeat of a member that may answer alone
//   - the other members that are alive
//   - the newest epochs that the member did not name: its next heartbeat names them, because it
//     is to remember those of others as well
//   - the other members that are silent
//   - for each epoch that it has named a list: "delivered"; "refused", if the group does not
//     accept the epoch; "contradicted", if the group has another decision; "decided" and the
//     decision, if the member lacks that; or "open" and what each member has answered, which
//     this one writes again if it is lost
//
// The group has the window of the member that came first. A member with another window
// stands outside while a member with the group's window is alive: its epochs are not
// accepted. When none is alive, and the member was not outside just now (Redis may have lost
// the list of members), its window becomes that of the group. An epoch whose length differs
// from that of the epochs before is accepted only if it starts after all of them, so that no
// two records have one window_start.
//
// It notes the last heartbeat of a member that may answer alone (with --redis-fail=open): this
// heartbeat, if the argument is empty, or else the time that this member has learnt. Members may
// differ in that setting while it is being changed.
//
// If the ledger has lost data, the others that this member knew of are listed again, as silent
// ones: a member that does not reach the ledger may go on answering ids in every later epoch.
var beatScript = rueidis.NewLuaScriptRetryable(luaWrites + luaNow + luaLost + luaAnswers + luaDecision + `
local me, ttl, keep, forget = ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local lease, claims, unsettled, window, opened = ARGV[5], ARGV[6] == '1', ARGV[7], ARGV[8], ARGV[9]
local behind = lost(KEYS[1], me, ARGV[11])
local arg = 15 + tonumber(ARGV[14])
if behind then
  for i = 15, arg - 1 do
    if not redis.call('ZSCORE', KEYS[1], ARGV[i]) then redis.call('ZADD', KEYS[1], now - ttl - 1, ARGV[i]) end
  end
end
redis.call('ZADD', KEYS[1], now, me)
redis.call('HSET', KEYS[3], me, window)
if unsettled == '' then
  redis.call('HDEL', KEYS[2], me)
else
  redis.call('HSET', KEYS[2], me, unsettled)
end
-- A beat that was long on its way takes nothing back.
if opened ~= '' and tonumber(opened) > (tonumber(redis.call('HGET', KEYS[7], me) or '') or -math.huge) then
  redis.call('HSET', KEYS[7], me, opened)
end
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - forget)) do
  redis.call('ZREM', KEYS[1], gone)
  redis.call('HDEL', KEYS[2], gone)
  redis.call('HDEL', KEYS[3], gone)
  redis.call('HDEL', KEYS[7], gone)
end
local alone, last_alone = ARGV[13] == '' and now or tonumber(ARGV[13]), tonumber(redis.call('HGET', KEYS[6], 'alone') or 0)
if alone > last_alone then redis.call('HSET', KEYS[6], 'alone', string.format('%.0f', alone)) end
local agreed = redis.call('HGET', KEYS[6], 'length')
local others, insider, outsider = {}, '', ''
for _, m in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - ttl, '+inf')) do
  if m ~= me then
    others[#others + 1] = m
    local w = redis.call('HGET', KEYS[3], m)
    if w and w ~= window and (w == agreed or agreed == window) then
      if w == agreed then insider = w .. ' ' .. m else outsider = w .. ' ' .. m end
    end
  end
end
local inside = agreed == window or insider == '' and claims
if inside then
  redis.call('HSET', KEYS[6], 'length', window)
elseif insider == '' then
  insider = (agreed or '') .. ' '
end
local function there(key, name)
  return redis.call('ZSCORE', KEYS[5], name) or redis.call('EXISTS', key) == 1
end
local function takes(key, name)
  if there(key, name) then return true end
  if not inside then return false end
  local start, span = string.match(name, '^(%-?%d+):(%d+)$')
  start = tonumber(start)
  local g = redis.call('HMGET', KEYS[6], 'span', 'from', 'last')
  local last = tonumber(g[3] or '')
  if g[1] == span then
    if g[2] and start < tonumber(g[2]) then return false end
  elseif not g[1] then
    redis.call('HSET', KEYS[6], 'span', span)
  elseif start > last then
    redis.call('HSET', KEYS[6], 'span', span, 'from', start)
  else
    return false
  end
  -- One clock that is hours ahead shall not keep the group from another length.
  if not last or start > last and start < now + 3600000 then redis.call('HSET', KEYS[6], 'last', start) end
  return true
end
local epochs, named, unnamed = {}, {}, {}
for i = 8, #KEYS do
  local key, answer = KEYS[i], {'open'}
  local name, ends, unique, complete, exact, sealed, under, had, uncertain, n = unpack(ARGV, arg, arg + 9)
  local first = arg + 10
  arg = first + 2 * n
  named[name] = true
  if redis.call('HEXISTS', key, 'delivered') == 1 then
    answer = {'delivered'}
  elseif had ~= '1' and unique == '' and not (had == '?' and there(key, name) or had == '0' and takes(key, name)) then
    answer = {'refused'}
  else
    redis.call('ZADD', KEYS[5], ends, name)
    local decided = decision(key)
    if decided and unique == '' then
      answer = decided
    elseif decided then
      if decided[2] ~= unique then answer = {'contradicted'} end
    else
      for a = first, arg - 1, 2 do answered(key, ARGV[a], ARGV[a + 1]) end
      if uncertain == '1' then redis.call('HSET', key, 'd:' .. me, 1) else redis.call('HDEL', key, 'd:' .. me) end
      if unique ~= '' then
        redis.call('HSET', key, 'unique', unique, 'complete', complete, 'exact', exact, 'sealed', sealed, 'under', under)
      else
        -- What the member has reported; else these are empty.
        if complete == '1' then redis.call('HSET', key, 'complete', 1) end
        if exact == '0' then redis.call('HSET', key, 'inexact', 1) end
        if under ~= '' and under ~= '0' then redis.call('HSET', key, 'k:' .. me, under) end
        local h = redis.call('HGETALL', key)
        for f = 1, #h, 2 do
          if string.sub(h[f], 1, 2) == 'm:' then
            answer[#answer + 1], answer[#answer + 2] = string.sub(h[f], 3), h[f + 1]
          end
        end
      end
      redis.call('PEXPIRE', key, keep)
    end
  end
  epochs[#epochs + 1] = answer
end
for i = 1, 7 do
  if i ~= 4 then redis.call('PEXPIRE', KEYS[i], keep) end
end
local leader = redis.call('GET', KEYS[4])
if leader == me and ARGV[12] ~= '1' then
  redis.call('DEL', KEYS[4])
  leader = false
elseif leader == me or not leader and inside and ARGV[12] == '1' then
  redis.call('SET', KEYS[4], me, 'PX', lease)
  leader = me
end
for _, name in ipairs(redis.call('ZRANGE', KEYS[5], '-' .. ARGV[10], -1)) do
  if not named[name] then unnamed[#unnamed + 1] = name end
end
return {{string.format('%.0f', now), leader == me and '1' or '0', insider, outsider, behind and '1' or '0',
  string.format('%.0f', math.max(alone, last_alone))}, others, unnamed,
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ttl - 1), epochs}
`)

// luaUnlisted returns the members that the ledger does not have in an epoch and that have opened
// no later one: they may have answered ids of it that the ledger has not learnt of yet.
const luaUnlisted = `
local function unlisted(members, opened, listed, start)
  local list = {}
  for _, m in ipairs(redis.call('ZRANGE', members, 0, -1)) do
    local newest = tonumber(redis.call('HGET', opened, m) or '')
    if not listed[m] and (not newest or newest <= start) then list[#list + 1] = m end
  end
  return list
end
`

// sealScript answers whether the epoch may be sealed now: "decided" and the decision; or
// "wait" and for how many ms at most; or "seal" and the members of the epoch. "+" stands
// before those that have not reported what they have answered, "0" before those without a
// part in it, "=" before the others, and "?" before members that may have answered ids
// without the ledger: see decideScript.
//
// It may be sealed when every member that is alive has left it, but, by the clock of
// Redis, not earlier than the skew before its end: a single member with a wild clock must
// not seal the future. For a member that is alive and has not left, the seal waits until the
// slowest clock has turned, the skew after the end. For one that holds ids which Redis does
// not have it waits longer; after that the record is not exact. For a silent one it does not
// wait.
//
// First the script writes again what the caller knows of the members' answers: a caller that has
// left sends no heartbeats, and may be the only member that remembers them.
var sealScript = rueidis.NewLuaScriptRetryable(luaWrites + luaNow + luaLost + luaAnswers + luaDecision + luaUnlisted + `
local ttl, start, ends = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local skew, longer, lock = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local function pause(ms) return {'wait', string.format('%.0f', ms)} end
local decided = decision(KEYS[3])
if decided then return decided end
if now < ends - skew then return pause(ends - skew - now) end
if lost(KEYS[1], ARGV[8], ARGV[9]) then return pause(skew) end
for i = 10, #ARGV, 2 do answered(KEYS[3], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[3], ARGV[7])
-- One with another window has left every epoch of the group.
local agreed = redis.call('HGET', KEYS[5], 'length')
local function left(m)
  local w = agreed and redis.call('HGET', KEYS[4], m)
  if w and w ~= agreed then return true end
  local n = redis.call('HGET', KEYS[3], 'm:' .. m)
  return n and string.sub(n, -1) ~= '+'
end
local inexact = false
local wait = 0
for _, m in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - ttl, '+inf')) do
  if not left(m) then wait = math.max(wait, ends + skew - now) end
  local oldest, newest = string.match(redis.call('HGET', KEYS[2], m) or '', '^(%-?%d+) (%-?%d+)$')
  if oldest and tonumber(oldest) <= start and start <= tonumber(newest) then
    inexact = true
    wait = math.max(wait, ends + skew + longer - now)
  end
end
if wait > 0 then return pause(wait) end
local locked = tonumber(redis.call('HGET', KEYS[3], 'locked') or 0)
if locked > now then return pause(locked - now) end
redis.call('HSET', KEYS[3], 'locked', now + lock)
if inexact then redis.call('HSET', KEYS[3], 'inexact', 1) end
redis.call('PEXPIRE', KEYS[3], ARGV[7])
local out, all, listed = {'seal'}, redis.call('HGETALL', KEYS[3]), {}
for f = 1, #all, 2 do
  if string.sub(all[f], 1, 2) == 'm:' then
    listed[string.sub(all[f], 3)] = true
    local n, part = all[f + 1], '='
    if n == '0' then part = '0' elseif string.sub(n, -1) == '+' then part = '+' end
    out[#out + 1] = part .. string.sub(all[f], 3)
  end
end
for _, m in ipairs(unlisted(KEYS[1], KEYS[6], listed, start)) do out[#out + 1] = '?' .. m end
return out
`)

// decideScript decides the count of the epoch, once, and answers "decided" and the decision,
// with the reason if it is not exact.
//
// The record has the sum of the answers that the members have reported; the number of ids in
// Redis is the check. If there are fewer ids, some are lost or were given twice. More ids do no
// harm if they were added without an answer. But members of luaUnlisted may have answered them.
// If any member had fail open in the last forgetMember, members of luaUnlisted may also have
// answered ids that are not in Redis. That such a member was in contact after the end of the
// epoch proves nothing, because it may be late itself.
//
// If members ended without a report, they have answered the rest of the ids, which must be at
// least as many as the numbers that they sent last. But the rest may be refused ids: if any
// member, gone or not, has uncertain ids; or if one that is gone has not shown a lane that it
// had the reply to its last batch, because it may be asleep or cut off, and still refuse those.
//
// All of this holds only if each write that can have been lost was added again (whole):
// otherwise a lost id and one that was added without an answer would cancel each other.
//
// The lanes were sealed for the members that sealScript has listed. If the ledger has other
// members or answers by now, the reply is "lost", and the seal begins again. One change is
// allowed: a member that was listed as one without a report may have reported since.
//
// The counts of the keys are those of Redis. If ids were added without an answer, the counts
// are right only if as many ids are under keys as the members have answered under keys.
var decideScript = rueidis.NewLuaScriptRetryable(luaWrites + luaNow + luaLost + luaDecision + luaUnlisted + `
local ids, exact, whole, keep, name, ends, open = tonumber(ARGV[1]), ARGV[2] == '1', ARGV[3] == '1', ARGV[4], ARGV[5], ARGV[6], ARGV[7] == '1'
local start = tonumber(string.match(name, '^(%-?%d+):'))
local under, fit, unanswered = tonumber(ARGV[8]), ARGV[9] == '1', ARGV[10] == '1'
local decided = decision(KEYS[2])
if decided then return decided end
if lost(KEYS[3], ARGV[11], ARGV[12]) then return {'lost'} end
open = open or tonumber(redis.call('HGET', KEYS[5], 'alone') or 0) > now - tonumber(ARGV[13])
local parts, fields = {}, {}
for i = 14, #ARGV do parts[string.sub(ARGV[i], 2)] = string.sub(ARGV[i], 1, 1) end
local sum, least, keyed, members, absent, listed, uncertain = 0, 0, 0, 0, {}, {}, {}
local all = redis.call('HGETALL', KEYS[2])
for f = 1, #all, 2 do
  local kind, m, n = string.sub(all[f], 1, 2), string.sub(all[f], 3), all[f + 1]
  if kind == 'm:' then
    local part, running = parts[m], string.sub(n, -1) == '+'
    if not part or running and (part == '=' or part == '0') then return {'lost'} end
    parts[m], listed[m], members = nil, true, members + 1
    if running then
      absent[#absent + 1] = m
      least = least + tonumber(string.sub(n, 1, -2))
    else
      local final, unsure = string.match(n, '^(%d+)(%??)$')
      sum = sum + tonumber(final)
      if unsure == '?' then uncertain[#uncertain + 1] = m end
    end
  elseif kind == 'k:' then
    keyed = keyed + tonumber(n)
  elseif kind == 'd:' then
    uncertain[#uncertain + 1] = m
  end
  if string.sub(kind, 2) == ':' then fields[#fields + 1] = all[f] end
end
for _, part in pairs(parts) do
  if part ~= '?' then return {'lost'} end
end
for _, f in ipairs(fields) do redis.call('HDEL', KEYS[2], f) end
local unknown = #absent == 0 and (ids > sum or open) and unlisted(KEYS[3], KEYS[4], listed, start) or {}
local unique, why = sum, ''
local function but(reason) why = why == '' and reason or why .. '; ' .. reason end
local numbers = string.format('%.0f ids are in Redis, %.0f answers are reported', ids, sum)
if #absent > 0 then
  unique = math.max(ids, sum + least)
  numbers = numbers .. string.format(', and %.0f or more were given by instances that ended without a report (%s)', least, table.concat(absent, ' '))
  if ids < sum + least then
    but(string.format('at least %.0f ids are lost or were given twice', sum + least - ids))
  elseif open then
    but('an instance that may have answered alone ended without a report')
  elseif #uncertain > 0 then
    but('instances had refused ids that may be in Redis (' .. table.concat(uncertain, ' ') .. ')')
  elseif unanswered and ids > sum + least then
    but('the last ids of an instance that ended without a report may have had no answer')
  end
elseif members == 0 and ids > 0 then
  unique = ids
  but('what the instances have answered is lost')
elseif #unknown > 0 and ids > sum then
  unique = ids
  but(string.format('%.0f ids may have been answered by instances that have not reported the window yet (%s)', ids - sum, table.concat(unknown, ' ')))
elseif #unknown > 0 then
  but(string.format('instances that may have answered alone have not reported the window (%s)', table.concat(unknown, ' ')))
elseif ids < sum then
  but(string.format('%.0f ids are lost or were given twice', sum - ids))
end
if #absent == 0 and ids > unique and keyed ~= under then
  unique = math.max(unique, under)
  but(string.format('%.0f ids are under keys, %.0f answers under keys are reported', under, keyed))
end
if not fit then but('the counts of the keys do not add up to the ids under keys') end
if not whole then but('Redis may have lost ids of instances that were not there to add them again') end
if not exact then but('ids may have been given twice while Redis lacked them, or apart from a master that its replicas do not answer') end
if redis.call('HGET', KEYS[2], 'inexact') then but('an instance held ids that Redis did not have, or Redis was down when it started') end
local complete = redis.call('HGET', KEYS[2], 'complete') or '0'
exact = why == '' and '1' or '0'
if why ~= '' then why = why .. ': ' .. numbers end
redis.call('HSET', KEYS[2], 'unique', string.format('%.0f', unique), 'complete', complete, 'exact', exact, 'sealed', now, 'under', string.format('%.0f', under), 'why', why)
redis.call('HDEL', KEYS[2], 'locked', 'inexact')
redis.call('PEXPIRE', KEYS[2], keep)
redis.call('ZADD', KEYS[1], ends, name)
return decision(KEYS[2])
`)

// unpublishedScript lists the epochs that are not delivered: those that are over, or with "1"
// all of them.
var unpublishedScript = rueidis.NewLuaScriptRetryable(luaWrites + luaNow + `
if ARGV[1] == '1' then return redis.call('ZRANGE', KEYS[1], 0, -1) end
return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now)
`)

// claimScript answers "written" if the line is written; "mine" if this member is to write it,
// because it is the leader or takes the lead; "lost" if the ledger has lost data since its last
// heartbeat; and else "other".
//
// A member that was to write the line, and has not reported it, may have written it before it was
// killed, or may be asleep before the write. So it keeps the claim for claimWait, whichever member
// leads. "again" is the answer to the process that has taken its place, which can look into the
// file; "late" is the answer to the leader after that time.
var claimScript = rueidis.NewLuaScriptRetryable(luaWrites + luaNow + luaLost + `
local me, lease, patience = ARGV[1], ARGV[2], tonumber(ARGV[5])
local h = redis.call('HMGET', KEYS[1], 'written', 'delivered', 'claimed')
if h[1] or h[2] then return 'written' end
if lost(KEYS[3], ARGV[3], ARGV[4]) then return 'lost' end
local answer = 'mine'
if h[3] then
  local at, claimant = string.match(h[3], '^(%d+) (.*)$')
  for i = 6, #ARGV do
    if claimant == ARGV[i] then answer = 'again' end
  end
  if claimant ~= me and answer == 'mine' then
    if now - at < patience then return 'other' end
    answer = 'late'
  end
end
if answer ~= 'again' then
  local leader = redis.call('GET', KEYS[2])
  if leader and leader ~= me then return 'other' end
  redis.call('SET', KEYS[2], me, 'PX', lease)
end
redis.call('HSET', KEYS[1], 'claimed', string.format('%.0f', now) .. ' ' .. me)
return answer
`)

// publishedScript notes that the record of the epoch is "written" (the line in a counts file)
// or "delivered".
var publishedScript = rueidis.NewLuaScriptRetryable(luaWrites + `
redis.call('HSET', KEYS[2], ARGV[1], 1)
redis.call('PEXPIRE', KEYS[2], ARGV[2])
if ARGV[1] == 'delivered' then redis.call('ZREM', KEYS[1], ARGV[3]) end
return 1
`)

// leaveScript takes the member out of the group, and the lead from it if others are alive. It
// answers how many are, and how many ms ago the last heartbeat of one of them was.
var leaveScript = rueidis.NewLuaScriptRetryable(luaWrites + luaNow + `
local me, ttl, unsettled = ARGV[1], tonumber(ARGV[2]), ARGV[3]
redis.call('ZREM', KEYS[1], me)
redis.call('HDEL', KEYS[3], me)
redis.call('HDEL', KEYS[5], me)
if unsettled == '' then redis.call('HDEL', KEYS[2], me) end
local others, last = 0, 0
for _, m in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - ttl, '+inf')) do
  others = others + 1
  last = math.max(last, tonumber(redis.call('ZSCORE', KEYS[1], m)))
end
if others > 0 and redis.call('GET', KEYS[4]) == me then redis.call('DEL', KEYS[4]) end
return {others, now - last}
`)
