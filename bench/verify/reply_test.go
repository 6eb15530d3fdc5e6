package main

import (
	"strings"
	"testing"
	"time"
)

// TestReplyHasOneVerdictForEachID: what does not give each id of a request its verdict and its
// window is not taken, and says why.
func TestReplyHasOneVerdictForEachID(t *testing.T) {
	const first, second = "2026-11-29T09:00:00Z", "2026-11-29T09:00:01Z"
	for name, tt := range map[string]struct {
		batch   int
		tokens  bool
		status  int
		body    string
		windows string
		want    string // of each id, or a part of the error
	}{
		"one":                            {0, false, 200, "ok", first, "ok:0"},
		"one, a repeat":                  {0, false, 409, "failed", first, "failed:0"},
		"one, refused":                   {0, false, 503, "failed", "", "refused"},
		"one, without a window":          {0, false, 200, "ok", "", "--window-header"},
		"one, in two windows":            {0, false, 200, "ok", first + ";n=1, " + second + ";n=1", "1 ids were judged"},
		"lines":                          {3, false, 200, "ok\nduplicate\nok\n", first, "ok:0 failed:0 ok:0"},
		"lines in two windows":           {3, false, 200, "ok\nduplicate\nok\n", first + ";n=1, " + second + ";n=2", "ok:0 failed:1 ok:1"},
		"lines, of which one is refused": {3, false, 200, "ok\nfull\nok\n", first + ";n=1, " + second + ";n=1", "ok:0 refused ok:1"},
		"lines, all refused":             {3, false, 503, "failed", "", "refused refused refused"},
		"lines, more than are judged":    {3, false, 200, "ok\nok\nok\n", first + ";n=1, " + second + ";n=1", "3 ids were judged"},
		"lines, fewer than there are":    {3, false, 200, "ok\nok\n", first, "2 words"},
		"lines, the last is cut":         {3, false, 200, "ok\nok\nok", first, "ends within a line"},
		"lines, replayed":                {3, false, 200, "ok\nok\nreplayed\n", first, "no token"},
		"lines, one status for all":      {3, false, 409, "failed", first, "1 words"},
		"items":                          {3, true, 200, `{"ok":1,"duplicate":1,"replayed":1,"refused":0,"results":["ok","duplicate","replayed"]}`, second, "ok:1 failed:1 ok:1"},
		"items in windows unknown":       {3, true, 200, `{"ok":1,"duplicate":1,"replayed":1,"refused":0,"results":["ok","duplicate","replayed"]}`, first + ";n=1, " + second + ";n=2", "unplaced:1 unplaced:1 unplaced:1"},
		"items, and other numbers":       {3, true, 200, `{"ok":2,"duplicate":1,"replayed":1,"refused":0,"results":["ok","duplicate","replayed"]}`, first, "not those of its results"},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := newDriver(&flags{URL: []string{"http://127.0.0.1:1"}, Batch: tt.batch, Tokens: tt.tokens, Window: time.Second, DuplicateStatus: 409})
			if err != nil {
				t.Fatal(err)
			}
			c := newConn(d, 0)
			c.reply.SetStatusCode(tt.status)
			c.reply.SetBodyString(tt.body)
			if tt.windows != "" {
				c.reply.Header.Set("Verve-Window", tt.windows)
			}
			asks := make([]ask, max(1, tt.batch))
			for i := range asks {
				asks[i].id = uint64(i)
				if tt.tokens {
					asks[i].token = uint64(i + 1)
				}
			}
			var got []string
			if err := c.take(asks); err != nil {
				if !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got error %v, want %q", err, tt.want)
				}
				return
			}
			for i, a := range c.got {
				text := [...]string{"ok", "failed", "refused", "unplaced"}[a.kind]
				if a.kind != answerRefused {
					start := map[string]string{first: ":0", second: ":1"}
					text += start[label(a.window)]
				}
				if got = append(got, text); a.id != uint64(i) {
					t.Errorf("answer %d is of id %d", i, a.id)
				}
			}
			if strings.Join(got, " ") != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
