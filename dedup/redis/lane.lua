-- The script that instances run on a lane in Redis: each run is one atomic operation.
-- DESIGN.md, "Many instances: Redis", has the reason for each.
--
-- A call names one key, the hash of a lane. All that is known of a lane is in this hash, so
-- that it is there wholly or not at all, also while its slot moves:
--
--   S<session>   the answer to the last batch of a session, packed, with the time of that
--                batch (which is at most a second too early)
--   I<session>   the ids that this batch has added, which are in doubt for other sessions,
--                and UNCERTAIN if the session has refused ids that may be in Redis; the field
--                is deleted when the doubt is over
--   A            the sessions that may have ids in doubt
--   E<epoch>     an open epoch: generation, whether it is inexact, ids of each kind, tokens,
--                and keys; packed
--   X<epoch>     how many tokens it has, also once it is sealed
--   Z            the sealed epochs: {epoch, ids, exact, whole, seconds it is kept until, ids
--                under keys, whether the master had replicas, unanswered}
--   L<epoch>     the sessions that it was sealed with, as the ledger had listed them
--   id           which master the data are of: see identify
--   loss, losses when writes of the lane may have been lost for the last time, and how often
--   replicas     whether that master had replicas
--   born         when the hash was begun
--   freeze       no new ids until then: lost ones are being added again
--
-- Its neighbours, under the same prefix and so in the same slot, are the sets
--
--   EPOCH:d :u   canonical decimals, UUIDs,
--         :t :h  short texts, digests of long texts
--         :k     digests of ids with their key
--         :x     digests of ids with their token; kept for the window after the seal
--
-- and the hash EPOCH:n: how many ids are under each key. It is kept until the record is
-- delivered.
--
-- Lua hashes every byte of every string that is made, and a number in a command is
-- printed with 17 digits. Therefore ids come and stay in lists that are one string
-- each (MessagePack, one raw after another), and numbers are packed.
--
-- Codes answer the ids of a batch, one byte each: 0 was there, 1 done, 2 in doubt, 4 is
-- not there, 5 cannot be taken back any more, 6 was there with this token; 7: the token is
-- in the window before, 8: in the next window; 9 too many keys. P after the codes: the epoch
-- became inexact by what the batch has found of tokens; the session notes that, and repeats
-- it if the hash is lost.

local call, pack, parse = redis.call, cmsgpack.pack, cmsgpack.unpack
local KINDS, PLAIN = {'d', 'u', 't', 'h', 'k'}, 4

-- few does the work of batch in the usual case: a few new ids of one kind, without a key or a
-- token, in an open epoch. Its nine arguments are those of batch up to the seconds to live, then
-- the number of the kind, and the list. It answers how many ids the epoch has, or 'missing'. In
-- any other case it returns nothing, and has changed nothing. It comes first because each run
-- makes all functions below it again, which takes as long as few itself.
local function few(key, a)
  local session, epoch, k, list = a[2], a[5], tonumber(a[8]), a[9]
  local S, E = 'S' .. session, 'E' .. epoch
  local h = call('HMGET', key, S, E, 'freeze', 'losses')
  local state, open = h[1], h[2]
  if not state or not open or h[3] then return end
  local _, last, at = cmsgpack.unpack_limit(state, 2)
  local e = {parse(open)}
  local seq, size = tonumber(a[3]), e[2 + k]
  if seq ~= last + 1 or e[1] ~= a[6] or size == 0 then return end
  local set, ids = key .. ':' .. epoch .. ':' .. KINDS[k], {parse(list)}
  -- One command per id: a command for all of them returns how many are new, not which.
  local n = #ids
  for i = 1, n do
    if call('SADD', set, ids[i]) == 0 then
      if i > 1 then call('SREM', set, unpack(ids, 1, i - 1)) end
      return
    end
  end
  size = size + n
  if call('SCARD', set) ~= size then
    call('SREM', set, unpack(ids))
    return {'missing'}
  end
  e[2 + k] = size
  local all = e[3] + e[4] + e[5] + e[6] + e[7]
  call('HSET', key, S, pack(seq, at, string.rep('1', n), e[1], all, epoch, tonumber(h[4] or 0)), 'I' .. session, list, E, pack(unpack(e)))
  return all
end

if ARGV[1] == 'batch' and #ARGV == 9 then
  local answer = few(KEYS[1], ARGV)
  if answer then return answer end
  local k, list = tonumber(ARGV[8]), ARGV[9]
  ARGV[8], ARGV[9], ARGV[10] = '', '', '0'
  for i = 1, PLAIN do ARGV[10 + i] = i == k and list or '' end
end

local sub, find, rep, concat = string.sub, string.find, string.rep, table.concat
local try = redis.pcall
local NUMBER = {d = 1, u = 2, t = 3, h = 4, k = 5}
local UNDER, TOKENS, NAMES = 5, 6, 7 -- of an epoch's sizes

-- No packed id begins with this byte.
local UNCERTAIN = '\192'

-- How many characters at the start of a session's name are those of its instance.
local INSTANCE = 8

-- A session that has sent no batch for this many seconds leaves nothing in doubt for others.
local LAPSE = 10
-- A seal forgets sessions whose last batch was more than this many seconds before its epoch.
local FORGET = 3600
-- A freeze that ends more than this many seconds from now was written by a master whose clock
-- was ahead.
local AHEAD = 5

local function clock()
  local t = call('TIME')
  return t[1] + t[2] / 1e6
end

-- frozen reports whether new ids are to wait, and ends a freeze that is over.
local function frozen(key, freeze, now)
  local left = tonumber(freeze) - now
  if left > 0 and left < AHEAD then return true end
  call('HDEL', key, 'freeze')
end

-- note_loss notes that writes may have been lost: every session has to send a batch again.
local function note_loss(key, now)
  local losses = tonumber(call('HGET', key, 'losses') or 0) + 1
  call('HSET', key, 'loss', now, 'losses', losses)
  return losses
end

-- identify notes which master the data are of. The master's id changes when Redis is started
-- again, or a replica becomes the master: then the last writes may be lost. It returns whether
-- the id can be read, and whether this master has replicas, or had some at the last look. It
-- also notes when the hash was begun.
local function identify(key, now)
  if call('HEXISTS', key, 'born') == 0 then call('HSET', key, 'born', now) end
  local info = try('INFO', 'replication') -- which the user may not be allowed to run
  local id = type(info) == 'string' and string.match(info, 'master_replid:(%x+)')
  if not id then return false, false end
  local was = call('HMGET', key, 'id', 'replicas')
  if was[1] and was[1] ~= id then note_loss(key, now) end
  local some = string.match(info, 'connected_slaves:(%d+)') ~= '0' and '1' or '0'
  if was[1] ~= id or was[2] ~= some then call('HSET', key, 'id', id, 'replicas', some) end
  return true, some == '1' or was[1] == id and was[2] == '1'
end

-- sealed returns the list of the sealed epochs, and the entry of one of them if it is sealed.
local function sealed(key, epoch)
  local z = call('HGET', key, 'Z')
  local list = z and parse(z) or {}
  for i = 1, #list do
    if list[i][1] == epoch then return list, list[i] end
  end
  return list
end

-- remember stores the answer to a batch of a session, in case the batch comes again, and
-- which of its ids are in doubt for the others until the session's next batch. fields are the
-- other fields of the lane that change with it.
local function remember(key, session, doubt, fields, ...)
  call('HSET', key, 'S' .. session, pack(...), 'I' .. session, doubt, unpack(fields))
end

-- listed returns the sessions that may have ids in doubt.
local function listed(key)
  local a = call('HGET', key, 'A')
  return a and parse(a) or {}
end

-- join lists the session, so that others look for its ids in doubt. If it is new, the earlier
-- sessions of its instance have ended. Then join ends their doubts, for which retries would
-- wait until they lapse. Should such a session go on, it is treated as if it had lapsed.
local function join(key, session, new)
  local active = listed(key)
  for i = 1, #active do
    local other = active[i]
    if other == session then return end
    if new and sub(other, 1, INSTANCE) == sub(session, 1, INSTANCE) then
      local doubt = call('HGET', key, 'I' .. other)
      if doubt and doubt ~= '' then call('HDEL', key, 'I' .. other) end
    end
  end
  active[#active + 1] = session
  call('HSET', key, 'A', pack(active))
end

-- doubts returns the lists of ids that other sessions have added to the epoch (nil: to any) in
-- their last batches, and may not have answered yet. It ends a doubt that has lapsed, for good:
-- its session cannot take the ids back any more.
local function doubts(key, session, epoch, now)
  local active, left, found = listed(key), {}, {}
  for i = 1, #active do
    local other = active[i]
    local f = call('HMGET', key, 'S' .. other, 'I' .. other)
    local at, in_epoch
    if f[1] then
      local _
      _, at, _, _, _, in_epoch = parse(f[1])
    end
    if other == session or at and math.abs(now - at) < LAPSE then
      left[#left + 1] = other
      if other ~= session and (in_epoch == epoch or not epoch) and f[2] then found[#found + 1] = f[2] end
    elseif f[2] then
      call('HDEL', key, 'I' .. other)
    end
  end
  if #left < #active then call('HSET', key, 'A', pack(left)) end
  return found
end

-- withdraws reports whether a session may take back the ids of its last batch: it may if others
-- have looked for them ever since. They have not if the session is no longer listed: it had
-- lapsed before that batch arrived, which was long on its way.
local function withdraws(key, session)
  if call('HEXISTS', key, 'I' .. session) == 0 then return false end
  local active = listed(key)
  for i = 1, #active do
    if active[i] == session then return true end
  end
  return false
end

-- among returns whether an id is in one of the lists. It may mistake a part of another id for
-- it: then the id only waits.
local function among(lists, id)
  local packed = pack(id)
  for i = 1, #lists do
    if find(lists[i], packed, 1, true) then return true end
  end
  return false
end

-- opened reads an open epoch: its generation, its sizes, and whether it is inexact, because an
-- id may have been given twice, or is not in the log of its instance.
local function opened(packed)
  local e = {parse(packed)}
  return e[1], {unpack(e, 3)}, e[2]
end

-- complete reports whether the epoch has all that it should have: nothing of it was evicted
-- or deleted, or is on the move to another node.
local function complete(prefix, sizes)
  for k = 1, #KINDS do
    if (k <= PLAIN or sizes[k] > 0) and try('SCARD', prefix .. KINDS[k]) ~= sizes[k] then return false end
  end
  return (sizes[TOKENS] == 0 or try('SCARD', prefix .. 'x') == sizes[TOKENS]) and
    (sizes[NAMES] == 0 or try('HLEN', prefix .. 'n') == sizes[NAMES])
end

-- drop deletes the ids of an epoch, but not its tokens and the counts of its keys.
local function drop(key, epoch)
  for k = 1, #KINDS do try('UNLINK', key .. ':' .. epoch .. ':' .. KINDS[k]) end
end

-- discard deletes all of an epoch that is not in the hash of the lane.
local function discard(key, epoch)
  drop(key, epoch)
  try('UNLINK', key .. ':' .. epoch .. ':x')
  try('UNLINK', key .. ':' .. epoch .. ':n')
end

-- ways has what the modes l, r and a do with ids of one kind. key is the set of the kind. undo
-- gets what takes the changes back. Each returns by how many ids the set has grown, and the
-- codes, or no codes if all are 1.
local ways = {}

function ways.l(key, ids)
  local codes = call('SMISMEMBER', key, unpack(ids))
  for i = 1, #codes do codes[i] = codes[i] == 1 and '0' or '4' end
  return 0, codes
end

function ways.r(key, ids, undo)
  local there, found = call('SMISMEMBER', key, unpack(ids)), {}
  for i = 1, #ids do
    if there[i] == 1 then found[#found + 1] = ids[i] end
  end
  if #found == 0 then return 0 end
  undo[#undo + 1] = {key, found, 'SADD'}
  return -call('SREM', key, unpack(found))
end

function ways.a(key, ids, undo)
  local there, repeats = call('SMISMEMBER', key, unpack(ids)), 0
  for i = 1, #there do repeats = repeats + there[i] end
  local new, codes = ids
  if repeats > 0 then
    new, codes = {}, {}
    for i = 1, #there do
      if there[i] == 0 then
        codes[i] = '1'
        new[#new + 1] = ids[i]
      else
        codes[i] = '0'
      end
    end
    if #new == 0 then return 0, codes end
  end
  undo[#undo + 1] = {key, new}
  call('SADD', key, unpack(new))
  return #new, codes
end

-- Ids with a key or a token come in a list of their own, four strings each: kind, id, the
-- digest of the id with its token, key. A token or key that an id does not have is empty.

-- recognise gives code to the ids whose token is in the set and that have no code yet. of has
-- the numbers of the ids in the list.
local function recognise(set, list, of, codes, code)
  if #of == 0 then return end
  local tokens = {}
  for i = 1, #of do tokens[i] = list[4 * of[i] - 1] end
  local found = call('SMISMEMBER', set, unpack(tokens))
  for i = 1, #of do
    if found[i] == 1 and not codes[of[i]] then codes[of[i]] = code end
  end
end

-- sorted returns the ids of a list by their kind, and the number of each in the list.
local function sorted(list)
  local ids, at = {}, {}
  for i = 1, #list / 4 do
    local k = NUMBER[list[4 * i - 3]]
    local of = ids[k]
    if not of then
      of = {}
      ids[k], at[k] = of, {}
    end
    local n = #of + 1
    of[n], at[k][n] = list[4 * i - 2], i
  end
  return ids, at
end

-- count adds new ids to the counts of their keys. An id under a key for which there is no
-- room gets the code 9; \0 stands before a key for which the session has no room.
local function count(hash, list, codes, sizes, undo, max)
  local more, keys = {}, {}
  for i = 1, #codes do
    local key = list[4 * i]
    if codes[i] == '1' and sub(key, 1, 1) == '\0' then
      codes[i] = '9'
    elseif codes[i] == '1' and key ~= '' then
      if not more[key] then keys[#keys + 1] = key end
      more[key] = (more[key] or 0) + 1
    end
  end
  if #keys == 0 then return end
  local was, set, old, new, full = call('HMGET', hash, unpack(keys)), {}, {}, {}
  for i = 1, #keys do
    local key = keys[i]
    if was[i] then
      old[#old + 1], old[#old + 2] = key, was[i]
    elseif sizes[NAMES] < max then
      new[#new + 1] = key
      sizes[NAMES] = sizes[NAMES] + 1
    else
      full = full or {}
      full[key] = true
    end
    if not full or not full[key] then
      set[#set + 1], set[#set + 2] = key, tonumber(was[i] or 0) + more[key]
    end
  end
  for i = 1, full and #codes or 0 do
    if codes[i] == '1' and full[list[4 * i]] then codes[i] = '9' end
  end
  if #old > 0 then undo[#undo + 1] = {hash, old, 'HSET'} end
  if #new > 0 then undo[#undo + 1] = {hash, new, 'HDEL'} end
  if #set > 0 then call('HSET', hash, unpack(set)) end
end

-- put adds new members to a set, and returns how many they are.
local function put(set, members, undo)
  if #members > 0 then
    undo[#undo + 1] = {set, members}
    call('SADD', set, unpack(members))
  end
  return #members
end

-- add_named judges the ids of a list in the modes that add or look, adds the new ones, and
-- returns the codes. others are the sets of tokens of the window before and of the next one;
-- false: there is none.
local function add_named(prefix, list, mode, sizes, undo, others, max)
  local codes, restoring = {}, mode == 'p' or mode == 'f'
  local ids, at = sorted(list)
  local there, absent = {}, {} -- those with a token
  for k = 1, #KINDS do
    local found = ids[k] and call('SMISMEMBER', prefix .. KINDS[k], unpack(ids[k])) or {}
    for i = 1, #found do
      local n = at[k][i]
      codes[n] = false
      if found[i] == 1 then there[n] = true end
    end
  end
  local known = {}
  for i = 1, #codes do
    if list[4 * i - 1] ~= '' then
      local of = there[i] and known or absent
      of[#of + 1] = i
    end
  end
  local same = restoring and {} or codes -- an id that is added again was answered ok, whatever its token
  recognise(prefix .. 'x', list, known, same, '6')
  if not restoring then
    for i = 1, 2 do
      if others[i] then
        recognise(others[i], list, known, codes, i == 1 and '7' or '8')
        recognise(others[i], list, absent, codes, i == 1 and '7' or '8')
      end
    end
  end
  for i = 1, #codes do
    codes[i] = codes[i] or there[i] and '0' or mode == 'l' and '4' or '1'
  end
  count(prefix .. 'n', list, codes, sizes, undo, restoring and math.huge or max)
  for k = 1, #KINDS do
    local new = {}
    for i = 1, ids[k] and #ids[k] or 0 do
      if codes[at[k][i]] == '1' then new[#new + 1] = ids[k][i] end
    end
    sizes[k] = sizes[k] + put(prefix .. KINDS[k], new, undo)
  end
  local new = {}
  for i = 1, #absent do
    if codes[absent[i]] == '1' then new[#new + 1] = list[4 * absent[i] - 1] end
  end
  for i = 1, restoring and #known or 0 do
    if not same[known[i]] then new[#new + 1] = list[4 * known[i] - 1] end
  end
  sizes[TOKENS] = sizes[TOKENS] + put(prefix .. 'x', new, undo)
  return codes
end

-- take_back_named takes the ids of a list back, with their tokens.
local function take_back_named(prefix, list, sizes, undo)
  local codes = {}
  for i = 1, #list, 4 do
    local kind, id, token, key = list[i], list[i + 1], list[i + 2], list[i + 3]
    codes[#codes + 1] = '1'
    if call('SREM', prefix .. kind, id) == 1 then
      undo[#undo + 1] = {prefix .. kind, {id}, 'SADD'}
      sizes[NUMBER[kind]] = sizes[NUMBER[kind]] - 1
      if key ~= '' then
        local left = call('HINCRBY', prefix .. 'n', key, -1) -- below 0: the count is lost
        if left >= 0 then undo[#undo + 1] = {prefix .. 'n', {key, 1}, 'HINCRBY'} end
        if left <= 0 then call('HDEL', prefix .. 'n', key) end
        if left == 0 then sizes[NAMES] = sizes[NAMES] - 1 end
      end
      if token ~= '' and call('SREM', prefix .. 'x', token) == 1 then
        undo[#undo + 1] = {prefix .. 'x', {token}, 'SADD'}
        sizes[TOKENS] = sizes[TOKENS] - 1
      end
    end
  end
  return codes
end

-- run_named does what batch has to do with the list of ids with a key or a token. It returns the
-- codes, by how many ids the epoch has grown, whether the epoch becomes inexact, because a retry
-- may not be recognised, or may be although its id is in no count, and the list.
local function run_named(key, a, mode, sizes, undo)
  local prefix, list = key .. ':' .. a[5] .. ':', {parse(a[15])}
  local was, tokens, inexact, codes = {}, false, false
  for i = 3, #list, 4 do tokens = tokens or list[i] ~= '' end
  for i = 1, #sizes do was[i] = sizes[i] end
  if mode == '5' then
    -- Others have believed them: a retry may have been answered that its id is counted.
    codes, inexact = {}, tokens
    for i = 1, #list / 4 do codes[i] = '5' end
  elseif mode == 'r' then
    codes = take_back_named(prefix, list, sizes, undo)
  else
    local others = {}
    if tokens and (mode == 'a' or mode == 'l') then
      inexact = a[19] == '1'
      local has = call('HMGET', key, 'X' .. a[16], 'X' .. a[17])
      for i = 1, 2 do
        local set = key .. ':' .. a[15 + i] .. ':x'
        others[i] = has[i] and set
        inexact = inexact or try('SCARD', set) ~= tonumber(has[i] or 0)
      end
    end
    codes = add_named(prefix, list, mode, sizes, undo, others, tonumber(a[18]))
  end
  if not complete(prefix, sizes) then
    undo.missing = true
    error('missing')
  end
  local more = 0
  for k = 1, #KINDS do
    more = more + sizes[k] - was[k]
    if was[k] == 0 and sizes[k] > 0 then call('EXPIRE', prefix .. KINDS[k], a[7]) end
  end
  if was[TOKENS] == 0 and sizes[TOKENS] > 0 then call('EXPIRE', prefix .. 'x', a[7]) end
  if was[NAMES] == 0 and sizes[NAMES] > 0 then call('EXPIRE', prefix .. 'n', a[7]) end
  return codes, more, inexact, list
end

-- batch: session, sequence, mode, epoch, generation expected, seconds to live,
-- seconds to freeze, whether the log of the session has all ids that it would have to add
-- again, whether to note the time (2: and UNCERTAIN), and a list of ids of each kind. If
-- there are ids with a key or a token, also: their list, the names of the windows before and
-- after, how many keys the epoch may have, and whether tokens of the window before may be lost.
-- Modes: a add, l look, r take back, p restore what was lost, f add what was
-- decided without Redis, b show that the session lives.
local function batch(key, a, undo)
  local session, seq, mode, epoch, expect = a[2], tonumber(a[3]), a[4], a[5], a[6]
  local h = call('HMGET', key, 'S' .. session, 'E' .. epoch, 'freeze', 'losses')
  local losses = tonumber(h[4] or 0)
  local last, at, codes0, gen0, n0 = 0
  if h[1] then
    last, at, codes0, gen0, n0 = parse(h[1])
    if seq == last then return {'ok', codes0, gen0, n0} end
  end
  if seq < last then return {'old', '', '', last} end
  if seq ~= last + 1 then return {'gap', '', '', last} end

  local restoring, ping = mode == 'p' or mode == 'f', mode == 'b'
  local gen, sizes, inexact = nil, {0, 0, 0, 0, 0, 0, 0}, 0
  if h[2] then
    gen, sizes, inexact = opened(h[2])
  elseif not ping or expect ~= '' then
    local _, over = sealed(key, epoch)
    if over and not ping then return {'sealed'} end
    if over then gen, sizes[1] = expect, over[2] end
  end
  if expect ~= '' and gen ~= expect then return {'lost', '', gen or '', last} end

  if mode == 'r' and not withdraws(key, session) then mode = '5' end -- before it joins again
  local now
  local tick = a[10] ~= '0' or not at or h[3] or restoring
  if tick then
    now = clock()
    if h[3] and not restoring and not ping and frozen(key, h[3], now) then return {'frozen'} end
    if not at then identify(key, now) end -- before its first id is counted
    if not at or math.abs(now - at) > LAPSE / 2 then join(key, session, not at) end
    at = now
  end

  local n = sizes[1] + sizes[2] + sizes[3] + sizes[4] + sizes[UNDER]
  local uncertain = a[10] == '2' and UNCERTAIN or ''
  if ping then
    if tick and h[2] and not complete(key .. ':' .. epoch .. ':', sizes) then return {'missing'} end
    remember(key, session, uncertain, {}, seq, at, '', gen or '', n, epoch, losses)
    if tick then call('EXPIRE', key, a[7]) end
    return {'ok', '', gen or '', n}
  end
  if not gen then
    now = now or clock()
    identify(key, now)
    discard(key, epoch) -- its sets are still there if only the hash was evicted or deleted
    gen = session .. ':' .. seq .. ':' .. now
  end
  local fields = {}
  if mode == 'p' then
    losses = note_loss(key, now) - 1 -- the session counts as back when all is added: by its next batch of another mode
    fields = {'freeze', now + tonumber(a[8])}
    if a[9] == '0' then inexact = 1 end
  end

  local lists, parts, total, more = {}, {}, 0, 0 -- by kind; no part if all its codes are 1
  local way = ways[mode] or ways.a
  local prefix = key .. ':' .. epoch .. ':'
  for k = 1, PLAIN do
    local list = a[10 + k]
    if list ~= '' then
      local set, ids = prefix .. KINDS[k], {parse(list)}
      local added, codes
      if mode == '5' then
        added, codes = 0, {rep('5', #ids)}
      else
        added, codes = way(set, ids, undo)
      end
      -- A set that is not as large as it should be was evicted, deleted, or its slot
      -- is on the move to or from here: nothing may be judged with it.
      if try('SCARD', set) ~= sizes[k] + added then
        undo.missing = true
        error('missing')
      end
      if sizes[k] == 0 and added > 0 then call('EXPIRE', set, a[7]) end
      sizes[k] = sizes[k] + added
      total, more = total + #ids, more + added
      lists[k], parts[k] = ids, codes
    end
  end
  local named, asks = '', mode == 'a' or mode == 'l'
  local codes, list, unsure
  if a[15] then
    local tokens, added = sizes[TOKENS]
    codes, added, unsure, list = run_named(key, a, mode, sizes, undo)
    if unsure or restoring and added < #codes then inexact = 1 end
    if sizes[TOKENS] ~= tokens then fields[#fields + 1], fields[#fields + 2] = 'X' .. epoch, sizes[TOKENS] end
    n = n + added
    if asks then
      local mine, others = {}
      for i = 1, #codes do
        local id, code = list[4 * i - 2], codes[i]
        if code == '1' then
          mine[#mine + 1] = id
        elseif code ~= '4' and code ~= '9' then
          others = others or doubts(key, session, nil, now or clock())
          if among(others, id) then codes[i] = '2' end
        end
      end
      if #mine > 0 then named = pack(unpack(mine)) end
    end
  end
  n = n + more

  local answer, mine, others = '', {}
  for k = 1, PLAIN do
    local ids, codes = lists[k] or {}, parts[k]
    if mode == 'a' and not codes then mine[#mine + 1] = a[10 + k] end -- the list as it is
    for i = 1, asks and codes and #ids or 0 do
      if codes[i] == '1' then
        mine[#mine + 1] = pack(ids[i])
      elseif codes[i] == '0' then
        others = others or doubts(key, session, epoch, now or clock())
        if among(others, ids[i]) then codes[i] = '2' end
      end
    end
    answer = answer .. (codes and concat(codes) or rep('1', #ids))
  end
  local doubt = (#mine == 1 and mine[1] or concat(mine)) .. named .. uncertain
  if restoring and more < total then inexact = 1 end

  if codes then answer = answer .. concat(codes) .. (unsure and 'P' or '') end
  if more ~= 0 or restoring or codes or not h[2] then
    fields[#fields + 1], fields[#fields + 2] = 'E' .. epoch, pack(gen, inexact, unpack(sizes))
  end
  remember(key, session, doubt, fields, seq, at, answer, gen, n, epoch, losses)
  if tick then call('EXPIRE', key, a[7]) end
  return {'ok', answer, gen, n}
end

-- hello: session, sequence expected, new sequence, seconds to live, seconds to freeze.
-- After a loss the session goes on from a sequence that no batch still on its way
-- can have. The lost ids are still to be added: no seal may come before that.
local function hello(key, a)
  local session, expect, seq = a[2], tonumber(a[3]), tonumber(a[4])
  local state, last = call('HGET', key, 'S' .. session), 0
  if state then last = parse(state) end
  if last == seq then return {'ok'} end
  if last ~= expect then return {'gap', '', '', last} end
  local now = clock()
  identify(key, now)
  join(key, session)
  remember(key, session, '', {'freeze', now + tonumber(a[6])}, seq, now, '', '', 0, '', note_loss(key, now) - 1)
  call('EXPIRE', key, a[5])
  return {'ok'}
end

-- reset: epoch, generation (empty if the session does not know it). Some keys of the epoch are
-- lost. reset deletes the others too, because every session notices that, and adds its own ids
-- again. The number of tokens (X<epoch>) stays: until the tokens are there again, a retry in
-- the next window must find that some are missing.
local function reset(key, a)
  local e = call('HGET', key, 'E' .. a[2])
  local gen, sizes = nil, nil
  if e then gen, sizes = opened(e) end
  if e and (gen == a[3] or a[3] == '' and not complete(key .. ':' .. a[2] .. ':', sizes)) then
    discard(key, a[2])
    call('HDEL', key, 'E' .. a[2])
    note_loss(key, clock())
  end
  return {'ok'}
end

-- seal: epoch, seconds to keep the seal, seconds to wait for sessions after a loss,
-- whether sets that are gone are given up, seconds to live, seconds to keep the tokens, and
-- the sessions that have answered ids: "+" SESSION of one that has not reported how many, "="
-- of one that has, "?" of one of which it is not known that it has answered any.
--
-- It answers the count, whether ids are known to be given twice or forgotten (exact
-- 0), whether it is certain that no write of the epoch was ever lost (whole 1), how
-- many of the ids are under keys, whether a replica has to confirm the seal, and whether
-- a session that has not reported may have left ids without an answer (unanswered 1): it
-- has sent no batch since the one that added them, and may be cut off, or asleep, and still
-- refuse them.
local function seal(key, a)
  local epoch = a[2]
  local list, over = sealed(key, epoch)
  if over then
    -- If the ledger went back since, this list may have sessions that the seal did not look at.
    local listed, whole = call('HGET', key, 'L' .. epoch) or '', over[4]
    for i = 8, #a do
      if not find(listed, pack(a[i]), 1, true) then whole = 0 end
    end
    return {'sealed', over[2], over[3], whole, over[6] or 0, over[7] or 0, over[8] or 0}
  end
  local now, exact, whole, n, under, unanswered = clock(), 1, 1, 0, 0, 0
  local known, replicas = identify(key, now)
  replicas = replicas and 1 or 0
  local began = tonumber(string.match(epoch, '^%-?%d+')) / 1000
  local h = call('HMGET', key, 'E' .. epoch, 'freeze', 'loss', 'losses', 'born')
  local lost_at, losses = tonumber(h[3] or 0), tonumber(h[4] or 0)
  local recent = lost_at > began - LAPSE
  local young = recent or tonumber(h[5]) > began - LAPSE
  if h[2] and frozen(key, h[2], now) then return {'frozen'} end

  if h[1] then
    local prefix = key .. ':' .. epoch .. ':'
    local _, sizes, inexact = opened(h[1])
    exact = 1 - inexact
    if not complete(prefix, sizes) then
      if a[5] ~= '1' then return {'missing'} end
      whole, exact = 0, 0
      for k = 1, #KINDS do
        local there = try('SCARD', prefix .. KINDS[k])
        sizes[k] = type(there) == 'number' and there or 0
      end
    end
    n, under = sizes[1] + sizes[2] + sizes[3] + sizes[4] + sizes[UNDER], sizes[UNDER]
    if sizes[TOKENS] > 0 then try('EXPIRE', prefix .. 'x', a[7]) end
    if sizes[NAMES] > 0 then try('EXPIRE', prefix .. 'n', a[6]) end
  end

  -- A hash that lacks one of these sessions was lost and begun again. But a session with "?"
  -- just has no ids here, if nothing was lost, and the hash not begun, since the epoch began.
  local absent = {}
  for i = 8, #a do
    local part, session = sub(a[i], 1, 1), sub(a[i], 2)
    absent[session] = part == '+'
    local f = call('HMGET', key, 'S' .. session, 'I' .. session)
    local state, _, at, seen, last = f[1]
    if state then _, at, _, _, _, last, seen = parse(state) end
    if part ~= '=' and last == epoch and f[2] ~= '' then unanswered = 1 end
    -- A session with a batch since writes may have been lost has added its own ids again, and
    -- one that was silent since before the epoch began has none in it.
    if not state and (part ~= '?' or young) or state and recent and seen ~= losses and (part ~= '?' or at > began - LAPSE) or
      absent[session] and not known then whole = 0 end
  end
  -- If writes may have been lost since shortly before the epoch began, every session that
  -- is there has to send a batch first: only the session can find that its own ids are lost.
  local all = call('HGETALL', key)
  for i = 1, #all, 2 do
    if sub(all[i], 1, 1) == 'S' then
      local session = sub(all[i], 2)
      local _, at, _, _, _, _, seen = parse(all[i + 1])
      if recent and seen ~= losses and at > began - LAPSE and not absent[session] and
        call('HEXISTS', key, 'I' .. session) == 1 and math.abs(now - lost_at) < tonumber(a[4]) then return {'frozen'} end
      if at < began - FORGET then call('HDEL', key, 'S' .. session, 'I' .. session) end
    end
  end

  local kept = {}
  for i = 1, #list do
    if list[i][5] > now then
      kept[#kept + 1] = list[i]
    else
      call('HDEL', key, 'X' .. list[i][1], 'L' .. list[i][1])
    end
  end
  kept[#kept + 1] = {epoch, n, exact, whole, now + tonumber(a[3]), under, replicas, unanswered}
  call('HDEL', key, 'E' .. epoch)
  call('HSET', key, 'Z', pack(kept), 'L' .. epoch, #a < 8 and '' or pack(unpack(a, 8)))
  call('EXPIRE', key, a[6])
  drop(key, epoch)
  return {'sealed', n, exact, whole, under, replicas, unanswered}
end

-- bye: session. It ends, and leaves no ids in doubt. S<session> stays: the seal looks for it.
local function bye(key, a)
  call('HDEL', key, 'I' .. a[2])
  return {'ok'}
end

-- rights runs, on a key of its own, each command that this script and the ledger need. It
-- answers which of them the user may not run.
local function rights(key)
  key = key .. ':rights'
  local lacks = {}
  for _, c in ipairs({
    {'TIME'}, {'SET', key, 1, 'EX', 60}, {'GET', key}, {'DEL', key},
    {'HSET', key, 'f', 1}, {'EXPIRE', key, 60}, {'PEXPIRE', key, 60000}, {'HGET', key, 'f'}, {'HMGET', key, 'f'},
    {'HGETALL', key}, {'HEXISTS', key, 'f'}, {'HINCRBY', key, 'n', 1}, {'HLEN', key}, {'HSCAN', key, 0}, {'HDEL', key, 'f', 'n'},
    {'SADD', key, 'm'}, {'SCARD', key}, {'SMISMEMBER', key, 'm'}, {'SREM', key, 'm'},
    {'ZADD', key, 1, 'm'}, {'ZSCORE', key, 'm'}, {'ZRANGE', key, 0, -1}, {'ZRANGEBYSCORE', key, 0, 1}, {'ZREM', key, 'm'},
    {'EXISTS', key}, {'UNLINK', key},
  }) do
    local r = try(unpack(c))
    local err = type(r) == 'table' and r.err or ''
    if find(err, "can't run", 1, true) or find(err, 'permissions to run', 1, true) then
      lacks[#lacks + 1] = '+' .. string.lower(c[1])
    elseif find(err, "can't access", 1, true) or find(err, 'permissions to access', 1, true) then
      return {'lacks', '~verve:*', '', 0}
    end
  end
  if #lacks > 0 then return {'lacks', concat(lacks, ' '), '', 0} end
  return {'ok', '', '', 0}
end

-- add runs a batch. If that fails, add undoes what it has written, because Redis does not.
local function add(key, a)
  local undo = {}
  local ok, res = pcall(batch, key, a, undo)
  if ok then return res end
  for i = #undo, 1, -1 do
    local at, members, how = undo[i][1], undo[i][2], undo[i][3]
    try(how or 'SREM', at, unpack(members))
  end
  if undo.missing then return {'missing'} end
  if type(res) == 'table' then return res end
  return redis.error_reply(tostring(res))
end

local operations = {batch = add, hello = hello, reset = reset, seal = seal, bye = bye, rights = rights}
local mode = ARGV[1] == 'batch' and ARGV[4]
-- Operations that free memory, or need next to none, must work when Redis is full, or it would
-- stay full. A full Redis lets a script write if it has first run a command that frees.
if mode ~= 'a' and mode ~= 'p' and mode ~= 'f' then call('HDEL', KEYS[1], '') end
return operations[ARGV[1]](KEYS[1], ARGV)
