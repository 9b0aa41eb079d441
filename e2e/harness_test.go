// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

// Package e2e tests the status page in a browser, with cmd/caddy as a process. It is a
// separate module, so that builds of async_proxy do not depend on the browser driver.
package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// patience bounds every wait. No wait is expected to take that long.
const patience = 30 * time.Second

// program is the path of the Caddy under test.
var program string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "async-proxy-e2e")
	if err != nil {
		panic(err)
	}
	program = filepath.Join(dir, "caddy")
	build := exec.Command("go", "build", "-o", program, "./cmd/caddy")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building cmd/caddy: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// world is a Caddy with a proxy and the status page, and an origin.
type world struct {
	t                  *testing.T
	admin, proxy, page string // host:port
	config             string
	origin             *httptest.Server
	cmd                *exec.Cmd
	output             *bytes.Buffer
	exited             chan struct{}
}

const proxyOptions = "burst 5\nrefill 0.01\nallow 127.0.0.0/8"

func newWorld(t *testing.T, proxyOptions, statusOptions string) *world {
	t.Helper()
	w := &world{t: t, admin: freeAddress(t), proxy: freeAddress(t), page: freeAddress(t)}
	w.origin = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "hello from the origin")
	}))
	t.Cleanup(w.origin.Close)
	w.configure(proxyOptions, statusOptions)
	w.start()
	t.Cleanup(func() {
		w.stop()
		if t.Failed() {
			t.Logf("output of Caddy:\n%s", w.output)
		}
	})
	return w
}

// configure writes the Caddyfile. Clients set their address with X-Forwarded-For.
func (w *world) configure(proxyOptions, statusOptions string) {
	w.config = fmt.Sprintf(`{
	admin %s
	persist_config off
	skip_install_trust
	default_bind 127.0.0.1
	servers {
		trusted_proxies static 127.0.0.1/32
	}
	log {
		level WARN
	}
}
http://:%s {
	async_proxy {
		clients all
		%s
	}
}
http://localhost:%s {
	async_proxy_status {
		%s
	}
}
`, w.admin, port(w.proxy), proxyOptions, port(w.page), statusOptions)
}

func port(address string) string {
	_, port, _ := net.SplitHostPort(address)
	return port
}

// nextPort starts below the ephemeral port range, so that the kernel gives no port away
// between its choice here and its use.
var nextPort atomic.Int64

func init() { nextPort.Store(16000 + int64(os.Getpid()%4000)) }

// freeAddress returns a loopback address with a port that is not in use, a different one each time.
func freeAddress(t *testing.T) string {
	t.Helper()
	for {
		ln, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", nextPort.Add(1)))
		if errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return ln.Addr().String()
	}
}

func (w *world) start() {
	w.t.Helper()
	dir := w.t.TempDir()
	file := filepath.Join(dir, "Caddyfile")
	if err := os.WriteFile(file, []byte(w.config), 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.output, w.exited = new(bytes.Buffer), make(chan struct{})
	w.cmd = exec.Command(program, "run", "--config", file)
	w.cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	w.cmd.Stdout, w.cmd.Stderr = w.output, w.output
	if err := w.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	go func() {
		_ = w.cmd.Wait()
		close(w.exited)
	}()
	w.eventually("Caddy to listen", func() bool {
		conn, err := net.Dial("tcp4", w.page)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// stop ends Caddy as a service manager does. An open page must not keep it running.
func (w *world) stop() {
	w.t.Helper()
	_ = w.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-w.exited:
	case <-time.After(patience):
		w.t.Error("Caddy does not exit")
		_ = w.cmd.Process.Kill()
		<-w.exited
	}
}

// reload loads another config into the running Caddy.
func (w *world) reload(proxyOptions, statusOptions string) {
	w.t.Helper()
	w.configure(proxyOptions, statusOptions)
	w.load()
}

// load loads the config into the running Caddy.
func (w *world) load() {
	w.t.Helper()
	req, err := http.NewRequest(http.MethodPost, "http://"+w.admin+"/load", strings.NewReader(w.config))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Close = true
	req.Header.Set("Content-Type", "text/caddyfile")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer res.Body.Close()
	if text, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusOK {
		w.t.Fatalf("/load: %s: %s", res.Status, text)
	}
}

func (w *world) eventually(what string, condition func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// client returns a function that sends a request from the client with the given address.
func (w *world) client() func(address string) (status int) {
	transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: w.proxy})}
	w.t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport, Timeout: patience}
	return func(address string) int {
		req, err := http.NewRequest(http.MethodGet, w.origin.URL, nil)
		if err != nil {
			panic(err)
		}
		req.Header.Set("X-Forwarded-For", address)
		res, err := client.Do(req)
		if err != nil {
			return 0
		}
		_, _ = io.Copy(io.Discard, res.Body)
		res.Body.Close()
		return res.StatusCode
	}
}

// limit sends requests of a client until it gets a 429.
func (w *world) limit(address string) {
	w.t.Helper()
	get := w.client()
	w.eventually("a 429", func() bool { return get(address) == http.StatusTooManyRequests })
}

// tunnel opens a tunnel to the origin for the client with the given address.
func (w *world) tunnel(address string) net.Conn {
	w.t.Helper()
	conn, err := net.Dial("tcp4", w.proxy)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	target := strings.TrimPrefix(w.origin.URL, "http://")
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\nX-Forwarded-For: %s\r\n\r\n", target, address)
	answer := make([]byte, len("HTTP/1.1 200"))
	if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != "HTTP/1.1 200" {
		w.t.Fatalf("CONNECT: %s, %v", answer, err)
	}
	return conn
}

// page is the status page in a browser.
type page struct {
	t   *testing.T
	ctx context.Context

	mu      sync.Mutex
	trouble []string // errors in the console, and resources that failed to load
}

// open loads the page in a new browser, in a viewport of the given width.
func (w *world) open(width int64, scheme string) *page {
	w.t.Helper()
	return open(w.t, "http://localhost:"+port(w.page)+"/", width, scheme)
}

// open loads a page in a new browser.
func open(t *testing.T, url string, width int64, scheme string) *page {
	t.Helper()
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("chromium is missing; apt-get install chromium")
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(browser), chromedp.NoSandbox, chromedp.DisableGPU)
	allocator, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(cancel)
	ctx, cancel := chromedp.NewContext(allocator)
	t.Cleanup(cancel)
	p := &page{t: t, ctx: ctx}
	if err := chromedp.Do(ctx); err != nil { // the browser lives as long as this context
		t.Fatal(err)
	}
	p.do(chromedp.EmulateViewport(width, 900), colorScheme(scheme), chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, network.Enable, network.EnableParams{})
		return err
	}))
	p.watch()
	p.do(chromedp.Navigate(url))
	p.state("Live")
	return p
}

// colorScheme sets the color scheme that the operator prefers.
func colorScheme(name string) chromedp.Action[chromedp.Void] {
	return chromedp.Func(func(ctx context.Context, t *chromedp.Target) error {
		_, err := cdp.Call(ctx, t, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
			Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme(name)}},
		})
		return err
	})
}

func scheme(name string) string {
	if name == "" {
		return "light"
	}
	return name
}

// watch records errors in the page.
func (p *page) watch() {
	note := func(format string, args ...any) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.trouble = append(p.trouble, fmt.Sprintf(format, args...))
	}
	console := chromedp.Console(p.ctx)
	responses := chromedp.Events(p.ctx, network.ResponseReceived)
	failures := chromedp.Events(p.ctx, network.LoadingFailed)
	go func() {
		for message, err := range console {
			if err == nil && (message.IsException() || message.Type == chromedp.ConsoleError || message.Type == chromedp.ConsoleWarning) {
				note("console: %v", message)
			}
		}
	}()
	go func() {
		for event, err := range responses {
			if err == nil && event.Response.Status >= 400 {
				note("%s: status %d", event.Response.URL, event.Response.Status)
			}
		}
	}()
	go func() {
		for event, err := range failures {
			if err == nil && !event.Canceled { // by the page itself
				note("loading failed: %s: %s %s", event.Type, event.ErrorText, event.BlockedReason)
			}
		}
	}()
}

// clean fails the test if there were errors in the page.
func (p *page) clean() {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, trouble := range p.trouble {
		p.t.Error(trouble)
	}
}

func (p *page) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, 2*patience)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		p.t.Fatal(err)
	}
}

// run evaluates an expression in the page, and awaits it if it is a promise.
func run[T any](p *page, expression string) T {
	p.t.Helper()
	value, err := chromedp.Run(p.ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		p.t.Fatalf("%s: %v", expression, err)
	}
	return value
}

// until waits at most timeout for an expression to become true.
func (p *page) until(what, expression string, timeout time.Duration) {
	p.t.Helper()
	_, err := chromedp.Run(p.ctx, chromedp.Poll[bool](expression, chromedp.WithPollingInterval(20*time.Millisecond), chromedp.WithPollingTimeout(timeout)))
	if errors.Is(err, chromedp.ErrPollingTimeout) {
		p.clean() // which may say why
		p.t.Fatalf("not within %v: %s\nthe page shows\n%s", timeout, what, run[string](p, "document.querySelector('main').innerText"))
	}
	if err != nil {
		p.t.Fatalf("%s: %v", what, err)
	}
}

// state waits until the page shows the given state.
func (p *page) state(name string) {
	p.t.Helper()
	p.until("the state "+name, fmt.Sprintf("document.querySelector('header [role=status]').textContent === %q", name), patience)
}

// row returns an expression for the first row of the named table that contains all of
// the texts, or undefined.
func row(table string, texts ...string) string {
	return fmt.Sprintf("[...document.querySelectorAll('table[aria-labelledby=%s-title] tbody tr')].find((r) => %s.every((t) => r.innerText.includes(t)))",
		table, list(texts))
}

// rows returns an expression for the number of rows of the named table, without the row
// that says that it is empty.
func rows(table string) string {
	return fmt.Sprintf("document.querySelectorAll('table[aria-labelledby=%s-title] tbody tr:not(.empty)').length", table)
}

func list(texts []string) string {
	quoted := make([]string, len(texts))
	for i, text := range texts {
		quoted[i] = fmt.Sprintf("%q", text)
	}
	return "[" + strings.Join(quoted, ",") + "]"
}

// press clicks the button with the given label.
func (p *page) press(label string) {
	p.t.Helper()
	find := fmt.Sprintf("[...document.querySelectorAll('button')].find((b) => (b.getAttribute('aria-label') ?? b.textContent) === %q)", label)
	p.until("a button "+label, "!!"+find, patience)
	run[bool](p, find+".click() ?? true")
}

// choose selects a value of the list with the given label.
func (p *page) choose(label, value string) {
	p.t.Helper()
	run[bool](p, fmt.Sprintf("((list) => { list.value = %q; list.dispatchEvent(new Event('input', { bubbles: true })); return list.value === %[1]q })(document.querySelector('[aria-label=\"%s\"]'))", value, label))
}

// fill replaces the text of the field with the given label.
func (p *page) fill(label, text string) {
	p.t.Helper()
	field := chromedp.CSS(fmt.Sprintf("[aria-label=%q]", label))
	p.do(chromedp.Focus(field))
	run[chromedp.Void](p, "document.activeElement.select()")
	if text == "" {
		text = kb.Backspace
	}
	p.do(chromedp.SendKeys(field, text))
}
