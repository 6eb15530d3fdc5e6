package deploy_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"verve/internal/testproc"

	"github.com/goccy/go-yaml"
)

// promtool runs Prometheus' own checker.
func promtool(t *testing.T, stdin string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), testproc.Needs(t, "promtool", "promtool"), args...)
	cmd.Stdin = strings.NewReader(stdin)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// metricsPage is the page of a server with something to show of everything that
// it has; which is more with a certificate, and in a group.
func metricsPage(t *testing.T, flags ...string) string {
	t.Helper()
	certificate, _ := testproc.SelfSigned(t, "localhost")
	v := testproc.Start(t, slices.Concat(certificate, flags, []string{"--window=1h", "--kafka-brokers=127.0.0.1:9"})...)
	_, page := v.Get(v.Admin + "/metrics")
	v.StopAtOnce()
	return page
}

// ofGroup is a group whose Redis is down.
var ofGroup = []string{"--dedup=redis", "--redis-url=redis://127.0.0.1:9"}

// TestMetricsAreByTheConventions of Prometheus, as its own checker has them:
// help and type of each family, base units, names that say what is counted.
func TestMetricsAreByTheConventions(t *testing.T) {
	for name, flags := range map[string][]string{"alone": nil, "in a group": ofGroup} {
		t.Run(name, func(t *testing.T) { testConventions(t, metricsPage(t, flags...)) })
	}
}

func testConventions(t *testing.T, page string) {
	families := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+) `).FindAllStringSubmatch(page, -1) {
		if families[m[1]] {
			t.Errorf("%s is declared twice", m[1])
		}
		families[m[1]] = true
		if !strings.Contains(page, "# HELP "+m[1]+" ") {
			t.Errorf("%s has no help", m[1])
		}
	}
	for line := range strings.Lines(page) {
		name := line[:strings.IndexAny(line, "{ ")]
		if name != "#" && !families[name] && !families[histogramSuffix.ReplaceAllString(name, "")] {
			t.Errorf("%s has no type", name)
		}
	}
	promtool(t, page, "check", "metrics")
}

func TestAlertRulesFireWhenTheyShould(t *testing.T) {
	for _, args := range [][]string{
		{"check", "config", "prometheus/prometheus.yml"}, // and its rules
		{"test", "rules", "prometheus/verve.rules.test.yml"},
	} {
		promtool(t, "", args...)
	}
}

var (
	histogramSuffix = regexp.MustCompile(`_(bucket|sum|count)$`)
	metricName      = regexp.MustCompile(`\b(?:verve|process|go)_[a-z0-9_]+`)
	selector        = regexp.MustCompile(`\b((?:verve|process|go)_[a-z0-9_]+)\{([^}]*)\}`)
	matcher         = regexp.MustCompile(`(\w+)(!=|=~|!~|=)"([^"]*)"`)
)

// TestDashboardAndAlertsUseMetricsThatExist, with labels and values that exist.
func TestDashboardAndAlertsUseMetricsThatExist(t *testing.T) {
	page := metricsPage(t) + metricsPage(t, ofGroup...)
	for where, expr := range expressions(t) {
		for _, name := range metricName.FindAllString(expr, -1) {
			if strings.HasPrefix(name, "process_pressure_") || runtime.GOOS != "linux" && !strings.HasPrefix(name, "verve_") {
				continue // not every system tells
			}
			if family := histogramSuffix.ReplaceAllString(name, ""); !strings.Contains(page, "# TYPE "+name+" ") && !strings.Contains(page, "# TYPE "+family+" histogram\n") {
				t.Errorf("%s: there is no metric %s", where, name)
			}
		}
		for _, s := range selector.FindAllStringSubmatch(expr, -1) {
			for _, m := range matcher.FindAllStringSubmatch(s[2], -1) {
				if m[1] == "job" || m[1] == "instance" || strings.HasPrefix(m[3], "$") {
					continue // given by Prometheus
				}
				for value := range strings.SplitSeq(m[3], "|") {
					if line := regexp.MustCompile(`(?m)^` + s[1] + `\{[^}]*\b` + m[1] + `="` + regexp.QuoteMeta(value) + `"`); !line.MatchString(page) {
						t.Errorf("%s: there is no %s with %s=%q", where, s[1], m[1], value)
					}
				}
			}
		}
	}
}

// expressions are all queries of the dashboard and the rules, by where they
// stand.
func expressions(t *testing.T) map[string]string {
	t.Helper()
	read := func(path string) []byte {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	out := make(map[string]string)
	const rulesFile, dashboardFile = "prometheus/verve.rules.yml", "grafana/dashboards/verve.json"
	var rules struct {
		Groups []struct {
			Rules []struct{ Alert, Expr string }
		}
	}
	if err := yaml.Unmarshal(read(rulesFile), &rules); err != nil {
		t.Fatal(err)
	}
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			out[rulesFile+": "+r.Alert] = r.Expr
		}
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr, RefID string }
		}
		Annotations struct {
			List []struct{ Name, Expr string }
		}
		Templating struct {
			List []struct{ Name, Definition string }
		}
	}
	if err := json.Unmarshal(read(dashboardFile), &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			out[dashboardFile+": "+p.Title+" "+target.RefID] = target.Expr
		}
	}
	for _, a := range dashboard.Annotations.List {
		out[dashboardFile+": "+a.Name] = a.Expr
	}
	for _, v := range dashboard.Templating.List {
		out[dashboardFile+": variable "+v.Name] = v.Definition
	}
	if len(out) < 40 {
		t.Fatalf("only %d expressions were found", len(out))
	}
	return out
}

// TestDashboardQueriesAreValid: each is what Prometheus would take, with the
// dashboard's variables filled in.
func TestDashboardQueriesAreValid(t *testing.T) {
	type rule struct {
		Record string `json:"record"`
		Expr   string `json:"expr"`
	}
	type group struct {
		Name  string `json:"name"`
		Rules []rule `json:"rules"`
	}
	fill := strings.NewReplacer("$__rate_interval", "1m", "$job", ".+", "$group", ".+", "$instance", ".+")
	var g group
	for where, expr := range expressions(t) {
		if strings.HasPrefix(where, "grafana/") && !strings.Contains(where, ": variable ") {
			name := "x:" + regexp.MustCompile(`\W+`).ReplaceAllString(where, "_")
			g.Rules = append(g.Rules, rule{name, fill.Replace(expr)})
		}
	}
	if len(g.Rules) < 40 {
		t.Fatalf("only %d queries were found", len(g.Rules))
	}
	g.Name = "dashboard"
	b, err := json.Marshal(map[string][]group{"groups": {g}}) // JSON is YAML
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "rules.json")
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	promtool(t, "", "check", "rules", file)
}

// TestObserveProfileFindsItsFiles: what compose mounts into Prometheus and
// Grafana is there, and leads from one to the next.
func TestObserveProfileFindsItsFiles(t *testing.T) {
	b, err := os.ReadFile("../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		Services map[string]struct {
			Profiles, Volumes []string
			Environment       map[string]string
		}
	}
	if err := yaml.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	inside := map[string]string{} // of the containers: path -> ours
	for _, name := range []string{"prometheus", "grafana"} {
		s := f.Services[name]
		if !slices.Equal(s.Profiles, []string{"observe"}) {
			t.Errorf("%s starts with profiles %v", name, s.Profiles)
		}
		for _, v := range s.Volumes {
			if from, to, _ := strings.Cut(strings.TrimSuffix(v, ":ro"), ":"); strings.HasPrefix(from, "./") {
				inside[to] = from
			}
		}
	}
	for _, path := range []string{
		"/etc/prometheus/prometheus.yml", // where the image looks
		"/etc/grafana/provisioning/datasources/prometheus.yml",
		"/etc/grafana/provisioning/dashboards/verve.yml",
		f.Services["grafana"].Environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"],
	} {
		from := inside[filepath.Dir(path)]
		for dir := filepath.Dir(path); from == "" && dir != "/"; dir = filepath.Dir(dir) {
			if ours, ok := inside[dir]; ok {
				from = filepath.Join(ours, strings.TrimPrefix(filepath.Dir(path), dir))
			}
		}
		if _, err := os.Stat(filepath.Join("..", from, filepath.Base(path))); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	providers, err := os.ReadFile("grafana/provisioning/dashboards/verve.yml")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(providers, []byte("path: /etc/grafana/dashboards\n")) || inside["/etc/grafana/dashboards"] == "" {
		t.Error("Grafana looks for dashboards where there are none")
	}
}

// TestPrometheusScrapesEveryInstanceOfCompose, as listed targets: one that is
// discovered by its name is no target any more when its container is gone, and
// then no alert fires. What only a profile starts may be absent.
func TestPrometheusScrapesEveryInstanceOfCompose(t *testing.T) {
	var compose struct {
		Services map[string]struct {
			Build    any
			Profiles []string
		}
	}
	var prometheus struct {
		ScrapeConfigs []struct {
			JobName       string `yaml:"job_name"`
			StaticConfigs []struct {
				Targets []string
				Labels  map[string]string
			} `yaml:"static_configs"`
		} `yaml:"scrape_configs"`
	}
	for path, into := range map[string]any{"../docker-compose.yml": &compose, "prometheus/prometheus.yml": &prometheus} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(b, into); err != nil {
			t.Fatal(err)
		}
	}
	optional := map[string]string{} // target -> its label
	for _, c := range prometheus.ScrapeConfigs {
		for _, s := range c.StaticConfigs {
			for _, target := range s.Targets {
				if c.JobName == "verve" {
					optional[target] = s.Labels["optional"]
				}
			}
		}
	}
	want := map[string]string{}
	for name, s := range compose.Services {
		if s.Build == nil {
			continue
		}
		want[name+":8081"] = ""
		if len(s.Profiles) > 0 {
			want[name+":8081"] = "true"
		}
	}
	if len(want) < 3 || !maps.Equal(optional, want) {
		t.Errorf("Prometheus scrapes %v, want the instances of Compose %v", optional, want)
	}
}
