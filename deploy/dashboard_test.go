package deploy_test

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
)

// prometheus is a real one that scrapes the targets each second.
type prometheus struct {
	t   *testing.T
	url string
}

func startPrometheus(t *testing.T, targets ...string) prometheus {
	t.Helper()
	program := testproc.Needs(t, "prometheus", "promtool") // which comes with it
	dir, addr := t.TempDir(), testproc.FreeAddr(t)
	file := filepath.Join(dir, "prometheus.yml")
	config := fmt.Sprintf("global: {scrape_interval: 1s}\nscrape_configs: [{job_name: verve, static_configs: [{targets: ['%s']}]}]\n", strings.Join(targets, "', '"))
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	testproc.Daemon(t, addr, exec.Command(program, "--log.level=warn", "--config.file="+file, "--storage.tsdb.path="+dir, "--web.listen-address="+addr))
	testproc.Until(t, "Prometheus is ready", func() bool {
		resp, err := http.Get("http://" + addr + "/-/ready")
		if err == nil {
			_ = resp.Body.Close()
		}
		return err == nil && resp.StatusCode == http.StatusOK
	})
	return prometheus{t: t, url: "http://" + addr}
}

// get reads the data of an answer of the API.
func (p prometheus) get(path string, parameters url.Values, data any) {
	p.t.Helper()
	resp, err := http.Get(p.url + path + "?" + parameters.Encode())
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	answer := struct{ Data any }{data}
	if err := json.Unmarshal(body, &answer); err != nil || resp.StatusCode != http.StatusOK {
		p.t.Fatalf("%v: %d %v %s", parameters, resp.StatusCode, err, body)
	}
}

// shows reports whether the query has a value now that can be drawn.
func (p prometheus) shows(query string) bool {
	p.t.Helper()
	var data struct {
		Result []struct{ Value [2]any }
	}
	p.get("/api/v1/query", url.Values{"query": {query}}, &data)
	for _, series := range data.Result {
		if series.Value[1] != "NaN" {
			return true
		}
	}
	return false
}

// choices are what Grafana offers for a variable of the dashboard.
func (p prometheus) choices(definition string) (values []string) {
	p.t.Helper()
	m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(definition)
	if m == nil {
		p.t.Fatalf("%q is not of the form label_values(SELECTOR, LABEL)", definition)
	}
	p.get("/api/v1/label/"+m[2]+"/values", url.Values{"match[]": {m[1]}}, &values)
	return values
}

// TestDashboardShowsARealServer: a server alone and one of a group, both with every
// kind of answer, in a real Prometheus. Each query of the dashboard has a value.
func TestDashboardShowsARealServer(t *testing.T) {
	t.Parallel()
	receiver := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer receiver.Close()
	redis := testproc.StartRedis(t)
	start := func(admin string, flags ...string) *testproc.Server {
		t.Helper()
		return testproc.StartCmd(t, testproc.Verve(t, append([]string{"--listen=127.0.0.1:0", "--log-format=json", "--admin-listen=" + admin, "--window=1s",
			"--callback-allow=" + strings.TrimPrefix(receiver.URL, "http://")}, flags...)...))
	}
	admin := []string{testproc.FreeAddr(t), testproc.FreeAddr(t)}
	servers := []*testproc.Server{start(admin[0]), start(admin[1], "--dedup=redis", "--redis-url=redis://"+redis.Addr)}
	p := startPrometheus(t, admin...)

	_, page := servers[0].Get(servers[0].Admin + "/metrics")
	queries := expressions(t)
	maps.DeleteFunc(queries, func(where, query string) bool {
		return !strings.HasPrefix(where, "grafana/") || strings.Contains(where, ": variable ") ||
			strings.Contains(query, "process_pressure_") && !strings.Contains(page, "process_pressure_") // not every kernel measures it
	})
	fill := strings.NewReplacer("$__rate_interval", "10s", "$job", "verve", "$instance", strings.Join(admin, "|"))

	if len(queries) < 40 {
		t.Fatalf("only %d queries were found", len(queries))
	}
	// Everything at once, again and again: rates need a second sample, and some queries
	// show what happens only while it does. At the end a restart, for the annotation.
	restarted := false
	for id, deadline := 0, time.Now().Add(2*time.Minute); len(queries) > 0; id++ {
		for _, v := range servers {
			for _, path := range []string{"accept?id=", "accept?id=", "accept?endpoint=" + url.QueryEscape(receiver.URL) + "&id=c", "nothing?id="} {
				v.Get(fmt.Sprint(v.Public, "/api/verve/", path, id))
			}
		}
		maps.DeleteFunc(queries, func(_, query string) bool { return p.shows(fill.Replace(query)) })
		if len(queries) == 1 && !restarted {
			servers[0].Stop()
			servers[0], restarted = start(admin[0]), true
		}
		if time.Now().After(deadline) {
			t.Fatalf("without a value after %d rounds:\n%s", id, strings.Join(slices.Sorted(maps.Keys(queries)), "\n"))
		}
		time.Sleep(100 * time.Millisecond)
	}
	for where, definition := range expressions(t) {
		if strings.Contains(where, ": variable ") && definition != "" {
			if got := p.choices(strings.NewReplacer("$job", "verve", "$group", ".+").Replace(definition)); len(got) == 0 {
				t.Errorf("%s: %s offers nothing", where, definition)
			}
		}
	}
}
