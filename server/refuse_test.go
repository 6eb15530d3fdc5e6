package server

import (
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/rs/zerolog"
	"github.com/valyala/fasthttp"

	"verve/counter"
	"verve/dedup"
	"verve/internal/testproc"
)

// refusalLine is a line of the log about refusals.
type refusalLine struct {
	Level, Reason, Limit, Error, Message string
	Status                               int
	Hidden                               int
}

// refusals returns what the log says of them, by reason.
func refusals(t *testing.T, log *testproc.Buffer) map[string][]refusalLine {
	t.Helper()
	lines := map[string][]refusalLine{}
	for _, text := range strings.Split(strings.TrimSpace(log.String()), "\n") {
		var line refusalLine
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if line.Reason != "" {
			lines[line.Reason] = append(lines[line.Reason], line)
		}
	}
	return lines
}

// TestEveryCauseOfRefusalsIsLogged: one at once, with its status, and the number of the
// others, of each reason that there is.
func TestEveryCauseOfRefusalsIsLogged(t *testing.T) {
	const each = 1000
	var log testproc.Buffer
	s := newSite(t, func(c *Config) { c.Log = zerolog.New(&log) })
	for r := range reasons {
		var callers sync.WaitGroup
		for range 4 {
			callers.Go(func() {
				for range each / 4 {
					s.refuse(&fasthttp.RequestCtx{}, refusal{400, r, false})
				}
			})
		}
		callers.Wait()
	}
	s.stop()
	lines := refusals(t, &log)
	for r := range reasons {
		if r == reasonPanic { // see TestPanicCostsOneRequestAndTheEpochIsStillSealed
			continue
		}
		sum, shown := 0, 0
		for _, line := range lines[r.String()] {
			sum += line.Hidden // the first may know of others: four callers began at once
			if line.Status == 400 {
				shown++
			}
		}
		if shown == 0 {
			t.Errorf("%s: no line shows a refusal: %+v", r.String(), lines[r.String()])
		}
		if len(lines[r.String()]) > each/10 || sum+shown != each {
			t.Errorf("%s: %d lines tell of %d refusals, want few, and %d", r.String(), len(lines[r.String()]), sum+shown, each)
		}
	}
}

// failing is a store that cannot judge ids.
type failing struct {
	dedup.Set
	err error
}

func (f failing) AddMany(_ *counter.Epoch, _ []dedup.Item, verdicts []dedup.Verdict) error {
	if verdicts[0] = dedup.Unavailable; errors.Is(f.err, dedup.ErrFull) {
		verdicts[0] = dedup.Full
	}
	return f.err
}

// TestRefusalsAreLoggedWithTheirCause: a request that was as good as any is a warning, with the error
// behind it; one that was not is none.
func TestRefusalsAreLoggedWithTheirCause(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		raw  string
		want refusalLine
	}{
		{"store out of reach", errors.New("no answer within 200ms"), get("id=1"), refusalLine{Level: "warn", Reason: "unavailable", Error: "no answer within 200ms", Status: 503}},
		{"store full", dedup.ErrFull, get("id=1"), refusalLine{Level: "warn", Reason: "full", Status: 503}},
		{"no id", nil, get("id="), refusalLine{Level: "info", Reason: "bad-id", Status: 400}},
		{"another path", nil, "GET /secret HTTP/1.1\r\nHost: x\r\n\r\n", refusalLine{Level: "info", Reason: "not-found", Status: 404}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var log testproc.Buffer
			s := newSite(t, func(cfg *Config) {
				cfg.Log = zerolog.New(&log)
				cfg.Set = failing{cfg.Set, c.err}
			})
			s.ask(c.raw)
			lines := refusals(t, &log)[c.want.Reason]
			c.want.Message = "a request was refused"
			if len(lines) != 1 || lines[0] != c.want {
				t.Errorf("got %+v, want %+v", lines, c.want)
			}
			if strings.Contains(log.String(), "secret") {
				t.Error("the log repeats what the request said")
			}
		})
	}
}

// TestConnectionsOverALimitAreLogged: the first with the limit, the others counted.
func TestConnectionsOverALimitAreLogged(t *testing.T) {
	for limit, change := range map[string]func(*Config){
		"max-conns":             func(c *Config) { c.MaxConns = 1 },
		"max-conns-per-address": func(c *Config) { c.MaxConnsPerAddress = 1 },
	} {
		const over = 20
		var log testproc.Buffer
		s := newSite(t, func(c *Config) {
			c.Log = zerolog.New(&log)
			change(c)
		})
		held, r := s.dial()
		if _, err := held.Write([]byte(get("id=1"))); err != nil {
			t.Fatal(err)
		}
		if _, _, err := answer(r); err != nil {
			t.Fatal(err)
		}
		for range over {
			s.ask(get("id=1"))
		}
		s.stop()
		lines := refusals(t, &log)["busy"]
		told := 0 // on a machine so busy that the log has more than two lines, too
		for _, line := range lines {
			if told += line.Hidden; line.Limit != "" {
				told++
			}
		}
		if len(lines) < 2 || lines[0].Limit != limit || lines[0].Level != "warn" || lines[0].Hidden != 0 || told != over {
			t.Errorf("%s: %+v", limit, lines)
		}
	}
}
