package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/redis/rueidis"
	"github.com/valyala/fasthttp"

	"verve/bench"
)

// run serves until the process is ended.
func (s *serve) run() error {
	ln, err := net.Listen("tcp", s.Listen)
	if err != nil {
		return err
	}
	switch s.Design {
	case "bare":
		return serveBare(ln)
	case "seed":
		return serveSeed(ln)
	case "nethttp":
		return serveNetHTTP(ln)
	case "plain":
		return servePlain(ln, s.Redis)
	}
	return fmt.Errorf("unknown design %q", s.Design)
}

var (
	bodyOK     = []byte("ok")
	bodyFailed = []byte("failed")
)

// like returns a server with the settings that Verve's has.
func like(handler fasthttp.RequestHandler) *fasthttp.Server {
	return &fasthttp.Server{
		Handler:                      handler,
		Concurrency:                  1 << 16,
		ReadBufferSize:               8 << 10,
		MaxRequestBodySize:           64 << 10,
		NoDefaultServerHeader:        true,
		SecureErrorLogMessage:        true,
		DisablePreParseMultipartForm: true,
		CloseOnShutdown:              true,
	}
}

// serveBare answers `ok` to everything: what fasthttp and the kernel take.
func serveBare(ln net.Listener) error {
	return like(func(ctx *fasthttp.RequestCtx) {
		ctx.Response.Header.SetContentType("text/plain")
		ctx.SetBody(bodyOK)
	}).Serve(ln)
}

// servePlain keeps a key per id in a Redis that instances share, as it is usually done: SET
// NX EX, by a library that sends the requests of all connections on one.
func servePlain(ln net.Listener, redis string) error {
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{redis}, DisableCache: true})
	if err != nil {
		return err
	}
	return like(func(ctx *fasthttp.RequestCtx) {
		ctx.Response.Header.SetContentType("text/plain")
		minute := time.Now().Unix() / 60
		key := strconv.FormatInt(minute, 10) + ":" + string(ctx.QueryArgs().Peek("id"))
		err := client.Do(context.Background(), client.B().Set().Key(key).Value("1").Nx().ExSeconds(120).Build()).Error()
		switch {
		case err == nil:
			ctx.SetBody(bodyOK)
		case rueidis.IsRedisNil(err):
			ctx.SetStatusCode(fasthttp.StatusConflict)
			ctx.SetBody(bodyFailed)
		default:
			ctx.SetStatusCode(fasthttp.StatusServiceUnavailable)
			ctx.SetBody(bodyFailed)
		}
	}).Serve(ln)
}

// newSeed is the seed design with its ticker.
func newSeed() *bench.Seed {
	seed := bench.NewSeed()
	go func() {
		for range time.Tick(time.Minute) {
			log.Printf("unique: %d", seed.RPM())
			seed.Turn()
		}
	}()
	return seed
}

// serveSeed is the seed design on fasthttp.
func serveSeed(ln net.Listener) error {
	seed := newSeed()
	return like(func(ctx *fasthttp.RequestCtx) {
		ctx.Response.Header.SetContentType("text/plain")
		if string(ctx.Path()) != "/api/verve/accept" {
			ctx.SetStatusCode(fasthttp.StatusNotFound)
			return
		}
		id := ctx.QueryArgs().Peek("id")
		if len(id) == 0 {
			ctx.SetStatusCode(fasthttp.StatusBadRequest)
			ctx.SetBody(bodyFailed)
			return
		}
		if !seed.Add(id, 0) {
			ctx.SetStatusCode(fasthttp.StatusConflict)
			ctx.SetBody(bodyFailed)
			return
		}
		ctx.SetBody(bodyOK)
	}).Serve(ln)
}

// serveNetHTTP is the seed design on net/http.
func serveNetHTTP(ln net.Listener) error {
	seed := newSeed()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/verve/accept", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		id := r.URL.Query().Get("id")
		if id == "" {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write(bodyFailed) // a failed write is the client's loss
			return
		}
		if !seed.Add([]byte(id), 0) {
			w.WriteHeader(http.StatusConflict)
			_, _ = w.Write(bodyFailed)
			return
		}
		_, _ = w.Write(bodyOK)
	})
	return http.Serve(ln, mux)
}
