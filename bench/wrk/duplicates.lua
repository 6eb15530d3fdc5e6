-- Nine of ten requests repeat an id drawn from the last thousand new ones of
-- their thread; the tenth sends a new one, made as in unique.lua.
--
--   wrk -t2 -c64 -d10s -s bench/wrk/duplicates.lua http://127.0.0.1:8080 -- [RUN]

local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(args)
  local run = args[1] or 1000000 + os.time() % 1000000
  head = string.format("GET /api/verve/accept?id=%d%02d", run, number)
  tail = " HTTP/1.1\r\nHost: verve\r\n\r\n"
  first = 1000000000
  last = first
  turn = 0
end

function request()
  turn = turn + 1
  if turn % 10 == 1 then
    last = last + 1
    return head .. last .. tail
  end
  return head .. math.random(math.max(first + 1, last - 999), last) .. tail
end
