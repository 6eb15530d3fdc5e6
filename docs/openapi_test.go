package docs_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"verve/internal/testproc"

	"github.com/goccy/go-yaml"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

const openapiFile = "docs/openapi.yaml"

// openapi is the document that others make their clients from. Schemas of
// OpenAPI 3.1 are JSON Schemas, so a validator of these reads it as it is.
type openapi struct {
	Paths map[string]map[string]struct {
		Responses map[string]apiResponse
	}
	Components struct {
		Responses map[string]apiResponse
	}
	schemas  *jsonschema.Compiler
	answered map[string]bool // operations with statuses: "GET /readyz 200"
}

type apiResponse struct {
	Ref     string `json:"$ref"`
	Headers map[string]struct {
		Ref      string `json:"$ref"`
		Required bool
	}
	Content map[string]json.RawMessage
}

func readOpenAPI(t *testing.T) *openapi {
	t.Helper()
	b, err := os.ReadFile(openapiFile)
	if err != nil {
		t.Fatal(err)
	}
	if b, err = yaml.YAMLToJSON(b); err != nil {
		t.Fatal(err)
	}
	d := &openapi{schemas: jsonschema.NewCompiler(), answered: make(map[string]bool)}
	var document struct {
		Paths      map[string]map[string]json.RawMessage
		Components json.RawMessage
	}
	if err := json.Unmarshal(b, &document); err != nil {
		t.Fatal(err)
	}
	for _, item := range document.Paths {
		delete(item, "servers") // the rest are operations
	}
	operations, err := json.Marshal(document)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(operations, d); err != nil {
		t.Fatal(err)
	}
	whole, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	d.schemas.AssertFormat()
	if err := d.schemas.AddResource(openapiFile, whole); err != nil {
		t.Fatal(err)
	}
	return d
}

// valid holds a value against the schema at a place in the document, given by
// the names on the way there.
func (d *openapi) valid(t *testing.T, value []byte, isJSON bool, place ...string) {
	t.Helper()
	pointer := ""
	for _, name := range place {
		pointer += "/" + strings.NewReplacer("~", "~0", "/", "~1", "*", "%2A").Replace(name)
	}
	schema, err := d.schemas.Compile(openapiFile + "#" + pointer)
	if err != nil {
		t.Fatal(err)
	}
	var instance any = string(value)
	if isJSON {
		if instance, err = jsonschema.UnmarshalJSON(bytes.NewReader(value)); err != nil {
			t.Errorf("%s: %v: %s", pointer, err, value)
			return
		}
	}
	if err := schema.Validate(instance); err != nil {
		t.Errorf("%s\nhas %s\n%v", pointer, value, err)
	}
}

// ofWindow is where a path names a window.
var ofWindow = regexp.MustCompile(`/[^/]*[0-9][^/]*/`)

// ask sends a request and holds the answer against the document.
func (d *openapi) ask(t *testing.T, server, method, target string, status int, body io.Reader, contentType ...string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, server+target, body)
	if err != nil {
		t.Fatal(err)
	}
	for _, value := range contentType {
		req.Header.Set("Content-Type", value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	name := method + " " + target
	if resp.StatusCode != status {
		t.Errorf("%s: got %d %q, want %d", name, resp.StatusCode, got, status)
		return got
	}
	path, verb, code := ofWindow.ReplaceAllString(req.URL.Path, "/{window_start}/"), strings.ToLower(method), fmt.Sprint(status)
	answer, ok := d.Paths[path][verb].Responses[code]
	if !ok {
		t.Errorf("%s: the answer %d is not in %s", name, status, openapiFile)
		return got
	}
	d.answered[method+" "+path+" "+code] = true
	here := []string{"paths", path, verb, "responses", code}
	if name, ok := strings.CutPrefix(answer.Ref, "#/components/responses/"); ok {
		answer = d.Components.Responses[name]
		here = []string{"components", "responses", name}
	}

	for header, h := range answer.Headers {
		value := resp.Header.Get(header)
		if h.Required && value == "" {
			t.Errorf("%s: no %s in the answer %d", name, header, status)
		}
		if value == "" {
			continue
		}
		place := append(slices.Clone(here), "headers", header, "schema")
		if h.Ref != "" {
			place = append(strings.Split(strings.TrimPrefix(h.Ref, "#/"), "/"), "schema")
		}
		d.valid(t, []byte(value), false, place...)
	}
	for header := range resp.Header {
		if _, ok := answer.Headers[header]; !ok && (strings.HasPrefix(header, "Verve-") || header == "Retry-After") {
			t.Errorf("%s: the answer %d has %s, which is not in %s", name, status, header, openapiFile)
		}
	}
	media, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if _, ok := answer.Content[media]; !ok || err != nil {
		t.Errorf("%s: the answer %d is of type %q, which is not in %s", name, status, media, openapiFile)
		return got
	}
	d.valid(t, got, media == "application/json", append(slices.Clone(here), "content", media, "schema")...)
	return got
}

// TestOpenAPIDescribesTheServer holds the document against real answers, of
// each operation with each status, and against the routes in the source.
func TestOpenAPIDescribesTheServer(t *testing.T) {
	atRoot(t)
	d := readOpenAPI(t)
	received := make(chan []byte, 1)
	endpoint := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		received <- b
	}))
	defer endpoint.Close()

	dir := t.TempDir()
	earlier := `{"group":"verve","instance":"a","window_start":"2026-11-22T06:00:00Z","window_ms":3600000,"unique":1,"keys":1}` // its keys are gone
	if err := os.WriteFile(filepath.Join(dir, "windows.jsonl"), []byte(earlier), 0o600); err != nil {
		t.Fatal(err)
	}
	v := testproc.Start(t, "--data-dir="+dir, "--instance=a", "--window=1h", "--window-header", "--max-ids=2", "--shutdown-timeout=1m",
		"--callback-allow="+strings.TrimPrefix(endpoint.URL, "http://"))
	const accept = "/api/verve/accept"
	for _, c := range []struct {
		server, method, target string
		status                 int
		body                   io.Reader
	}{
		{v.Public, "GET", accept + "?id=42", 200, nil},
		{v.Public, "GET", accept + "?id=42", 409, nil},
		{v.Public, "GET", accept + "?id=", 400, nil},
		{v.Public, "GET", accept + "?id=1&endpoint=http://10.0.0.1/", 400, nil},
		{v.Public, "GET", accept + "?id=1&key=", 400, nil},
		{v.Public, "GET", accept + "?id=1&token=", 400, nil},
		{v.Public, "GET", accept + "?id=1", 400, strings.NewReader("a body")},
		{v.Public, "GET", accept + "?id=43&key=k&token=t&endpoint=" + endpoint.URL, 200, nil},
		{v.Public, "GET", accept + "?id=44", 503, nil},
		{v.Public, "POST", "/test", 200, strings.NewReader("{}")},
		{v.Public, "POST", "/test", 413, strings.NewReader(strings.Repeat("x", 64<<10+1))},
		{v.Admin, "GET", "/healthz", 200, nil},
		{v.Admin, "GET", "/readyz", 200, nil},
		{v.Admin, "GET", "/metrics", 200, nil},
		{v.Admin, "GET", "/api/windows", 200, nil},
		{v.Admin, "GET", "/api/windows?limit=1440", 200, nil},
		{v.Admin, "GET", "/api/windows?limit=1441", 400, nil},
		{v.Admin, "GET", "/api/windows/2001-01-01T00:00:00Z/keys", 404, nil},
		{v.Admin, "GET", "/api/windows/2001-01-01/keys", 400, nil},
		{v.Admin, "GET", "/api/windows/2026-11-22T06:00:00Z/keys", 410, nil},
		{v.Admin, "GET", "/", 200, nil},
	} {
		d.ask(t, c.server, c.method, c.target, c.status, c.body)
	}
	d.valid(t, <-received, true, "components", "schemas", "Callback")
	var windows struct {
		Open struct {
			Start string `json:"window_start"`
		}
	}
	if err := json.Unmarshal(d.ask(t, v.Admin, "GET", "/api/windows", 200, nil), &windows); err != nil {
		t.Fatal(err)
	}
	d.ask(t, v.Admin, "GET", "/api/windows/"+windows.Open.Start+"/keys", 200, nil)
	for _, c := range []struct {
		query, contentType, body string
		status                   int
	}{
		{"", "text/plain", "42\n\n45\n", 200},
		{"?key=k&token=t", "application/json", `["42",43,{"id":"45"},{},{"id":"1","key":""},{"id":"1","token":7}]`, 200},
		{"?key=", "text/plain", "42", 400},
		{"", "application/x-ndjson", `{"id":"42"}`, 200},
		{"", "application/cloudevents+json", `{"specversion":"1.0","type":"t","source":"/a","id":"1"}`, 200},
		{"", "application/json", "[", 400},
		{"", "text/plain", strings.Repeat("1\n", 10_001), 413},
		{"", "application/xml", "<a/>", 415},
		{"?id=42", "", "", 409},
		{"?id=45", "", "", 503},
	} {
		d.ask(t, v.Public, "POST", accept+c.query, c.status, strings.NewReader(c.body), c.contentType)
	}

	d.ask(t, v.Admin, "GET", "/api/live", 200, nil)

	// The other methods are those that the document does not have.
	for path, allowed := range map[string][]string{accept: {"GET", "POST"}, "/test": {"POST"}} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE"} {
			if _, ok := d.Paths[path][strings.ToLower(method)]; ok != slices.Contains(allowed, method) {
				t.Errorf("%s %s: in %s is %v", method, path, openapiFile, ok)
			}
		}
	}

	if code := v.Stop(); code != 0 {
		t.Fatalf("exit code %d\n%s", code, v.Text())
	}
	lines, err := os.ReadFile(filepath.Join(dir, "counts.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(lines) {
		d.valid(t, line, true, "components", "schemas", "Record")
	}

	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(strings.Repeat("secret", 8)), 0o600); err != nil {
		t.Fatal(err)
	}
	v = testproc.Start(t, "--window=1h", "--admin-token-file="+token)
	for _, route := range adminRoutes(t) {
		switch route {
		case "/healthz", "/readyz":
			d.ask(t, v.Admin, "GET", route, 200, nil)
		default:
			d.ask(t, v.Admin, "GET", route, 401, nil)
		}
	}
	if code := v.Stop(); code != 0 {
		t.Errorf("exit code %d", code)
	}

	// A record that nobody takes holds up the stop, so that it can be looked at.
	v = testproc.Start(t, "--window=1h", "--kafka-brokers=127.0.0.1:9", "--shutdown-timeout=1h")
	v.Get(v.Public + accept + "?id=1")
	if err := v.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	v.AwaitStopping()
	d.ask(t, v.Admin, "GET", "/readyz", 503, nil)
	v.StopAtOnce()

	for path, operations := range d.Paths {
		for verb, operation := range operations {
			for code := range operation.Responses {
				if name := strings.ToUpper(verb) + " " + path + " " + code; !d.answered[name] {
					t.Errorf("%s is in %s and was not seen", name, openapiFile)
				}
			}
		}
	}
	for _, route := range adminRoutes(t) {
		if _, ok := d.Paths[route]["get"]; !ok {
			t.Errorf("GET %s is served and not in %s", route, openapiFile)
		}
	}
}

// adminRoutes are the paths that the admin listener serves, but for those of
// the Go profiler.
func adminRoutes(t *testing.T) (routes []string) {
	t.Helper()
	b, err := os.ReadFile("server/admin.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`HandleFunc\("GET (/[^"]*)"`).FindAllSubmatch(b, -1) {
		if path := strings.TrimSuffix(string(m[1]), "{$}"); !strings.HasPrefix(path, "/debug/") {
			routes = append(routes, path)
		}
	}
	if !slices.Contains(routes, "/readyz") {
		t.Fatalf("read only %q from server/admin.go", routes)
	}
	return routes
}
