-- Every request has an id that no request of any thread or run had
-- before: a decimal of the run, the thread and a counter.
--
--   wrk -t2 -c64 -d10s -s bench/wrk/unique.lua http://127.0.0.1:8080 -- [RUN [WITH]]
--
-- RUN   a number of up to seven digits; the time serves if there is none
-- WITH  token: each id has one, of the length of a UUID; key: one of 1,000 keys

local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  local run = args[1] or 1000000 + os.time() % 1000000
  with = args[2]
  head = string.format("GET /api/verve/accept?id=%d%02d", run, number)
  tail = " HTTP/1.1\r\nHost: verve\r\n\r\n"
  n = 1000000000
end

function request()
  n = n + 1
  if with == "token" then
    return head .. n .. "&token=7f3a9c41-5be2-4d10-a7c5-00" .. n .. tail
  elseif with == "key" then
    return head .. n .. "&key=campaign-" .. n % 1000 .. tail
  end
  return head .. n .. tail
end
