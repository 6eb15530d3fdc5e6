package system_test

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"verve/internal/testproc"
)

// TestHelpShowsWhatTheCommandReads: the examples on the first page are accepted,
// and a command shows its own settings.
func TestHelpShowsWhatTheCommandReads(t *testing.T) {
	t.Parallel()
	out, err := testproc.Verve(t, "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	examples := 0
	for _, m := range regexp.MustCompile(`(?m)^    verve( .*?)?(?:  .*)?$`).FindAllStringSubmatch(string(out), -1) {
		if strings.Contains(m[1], "--config") {
			continue // names a file that is not here
		}
		examples++
		if out, err := testproc.Verve(t, append(strings.Fields(m[1]), "--print-config")...).CombinedOutput(); err != nil {
			t.Errorf("verve%s: %v\n%s", m[1], err, out)
		}
	}
	if examples < 4 {
		t.Errorf("%d examples in\n%s", examples, out)
	}
	for command, want := range map[string]struct{ has, hasNot string }{
		"totals":      {"--follow --kafka-brokers --counts-file --data-dir", "--listen --window --callback-allow --max-conns"},
		"healthcheck": {"--admin-listen", "--data-dir --kafka-brokers"},
		"version":     {"--help", "--config --listen"},
		"serve":       {"--listen --window --kafka-brokers --callback-allow --log-level", "--follow"},
	} {
		out, err := testproc.Verve(t, command, "--help").Output()
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		shown := regexp.MustCompile(`--[a-z-]+`).FindAllString(string(out), -1)
		for _, flag := range strings.Fields(want.has) {
			if !slices.Contains(shown, flag) {
				t.Errorf("%s --help does not show %s", command, flag)
			}
		}
		for _, flag := range strings.Fields(want.hasNot) {
			if slices.Contains(shown, flag) {
				t.Errorf("%s --help shows %s", command, flag)
			}
		}
	}
}
