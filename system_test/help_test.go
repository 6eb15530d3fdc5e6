package system_test

import (
	"os/exec"
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
		"completion":  {"--help", "--config --listen"},
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
	if out, err := testproc.Verve(t, "completion", "tcsh").CombinedOutput(); testproc.ExitCode(err) != exitUsage {
		t.Errorf("completion for an unknown shell: %v %s", err, out)
	}
}

// TestCompletionCompletes, where the shell is installed.
func TestCompletionCompletes(t *testing.T) {
	t.Parallel()
	for shell, ask := range map[string]func(script string, words ...string) []string{
		"bash": func(script string, words ...string) []string {
			// As readline splits a line: at = too.
			line := "verve"
			for _, w := range words {
				line += " " + strings.TrimSuffix(strings.ReplaceAll(w, "=", " = "), " ")
			}
			split := strings.Fields(line)
			if last := words[len(words)-1]; last == "" {
				split = append(split, "''")
			}
			return []string{"bash", "-c", script + "\ncompopt() { :; }\nCOMP_WORDS=(" + strings.Join(split, " ") +
				"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _verve; printf '%s\\n' \"${COMPREPLY[@]}\""}
		},
		"fish": func(script string, words ...string) []string {
			return []string{"fish", "--no-config", "-c", script + "\ncomplete -C 'verve " + strings.Join(words, " ") + "' | string split -f1 \\t; true"}
		},
	} {
		t.Run(shell, func(t *testing.T) {
			if _, err := exec.LookPath(shell); err != nil {
				t.Skip("not installed")
			}
			script, err := testproc.Verve(t, "completion", shell).Output()
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				words []string
				want  string // all of them, or one with + in front
			}{
				{[]string{"tot"}, "totals"},
				{[]string{"comp"}, "completion"},
				{[]string{"completion", "z"}, "zsh"},
				{[]string{"--kafka-br"}, "--kafka-brokers"},
				{[]string{"--id-format=u"}, "uint64"},
				{[]string{"totals", "--fol"}, "--follow"},
			} {
				args := ask(string(script), c.words...)
				out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
				got := strings.Fields(string(out))
				for i, g := range got {
					got[i] = strings.TrimPrefix(strings.TrimSuffix(g, "="), "--id-format=")
				}
				if err != nil || !slices.Equal(got, []string{c.want}) {
					t.Errorf("%v: got %q %v, want %s", c.words, out, err, c.want)
				}
			}
		})
	}
}

// TestCompletionIsAScript that the shell takes, where it is installed.
func TestCompletionIsAScript(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script, err := testproc.Verve(t, "completion", shell).Output()
		if err != nil || !strings.Contains(string(script), "kafka-brokers") {
			t.Errorf("%s: %v\n%s", shell, err, script)
		}
		if _, err := exec.LookPath(shell); err != nil {
			continue
		}
		check := exec.CommandContext(t.Context(), shell, "-n", "/dev/stdin")
		check.Stdin = strings.NewReader(string(script))
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
	}
}
