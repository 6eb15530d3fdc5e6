-- As unique.lua, with the headers that a proxy adds: a request id and a trace parent
-- are others in every request, what names the client stays.
--
--   wrk -t2 -c64 -d10s -s bench/wrk/headers.lua http://127.0.0.1:8080 -- [RUN]

local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  local run = args[1] or 1000000 + os.time() % 1000000
  head = string.format("GET /api/verve/accept?id=%d%02d", run, number)
  middle = " HTTP/1.1\r\nHost: verve\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/150.0\r\n" ..
    "Accept: */*\r\nAccept-Encoding: gzip, br\r\nX-Forwarded-For: 203.0.113.7\r\nX-Forwarded-Proto: https\r\nX-Request-Id: "
  trace = string.format("\r\ntraceparent: 00-%012d%010d", run, number)
  n = 1000000000
end

function request()
  n = n + 1
  return head .. n .. middle .. "7f3a9c41-" .. n .. trace .. n .. "-00f067" .. n .. "-01\r\n\r\n"
end
