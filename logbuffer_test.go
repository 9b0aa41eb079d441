// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

// buffered returns a Caddyfile's log that buffers the lines for a file.
func buffered(path, options string) string {
	return fmt.Sprintf("\tlog {\n\t\toutput async_proxy_buffer {\n\t\t\twrap file %s\n\t\t\t%s\n\t\t}\n\t\tformat json\n\t}\n", path, options)
}

// inSite returns the site with something first in its block.
func inSite(site, text string) string { return strings.Replace(site, "{\n", "{\n"+text, 1) }

// paths returns the paths of the requests in an access log, in their order.
func paths(t *testing.T, file string) (list []string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var entry struct {
			Request struct{ URI string }
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		list = append(list, entry.Request.URI[strings.LastIndexByte(entry.Request.URI, '/'):])
	}
	return list
}

func TestLogBuffer(t *testing.T) {
	w := newWorld(t, "", nil)
	for name, site := range map[string]string{"fast path": w.site(""), "Caddy's server": byCaddy(w.site(""))} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "access.log")
			w.load(inSite(site, buffered(file, "flush_interval 1h")))
			var want []string
			expect := func(when string) {
				t.Helper()
				if got := paths(t, file); fmt.Sprint(got) != fmt.Sprint(want) {
					t.Errorf("%s, the file has %d of %d lines", when, len(got), len(want))
				}
			}
			send := func(n int) (sent []string) {
				for range n {
					path := fmt.Sprintf("/%d", len(want)+len(sent))
					c := w.dial()
					c.send(fmt.Sprintf("GET http://%s%s HTTP/1.1\nHost: x\nConnection: close\n\n", w.origin.Listener.Addr(), path))
					if res, _ := c.response(http.MethodGet); res.StatusCode != http.StatusOK {
						t.Fatal(res.Status)
					}
					c.readAll() // the line is there before the connection ends
					sent = append(sent, path)
				}
				return sent
			}

			sent := send(3)
			expect("before the interval")
			w.load(inSite(site, buffered(file, "flush_interval 50ms")))
			want = append(want, sent...)
			expect("after a reload")
			want = append(want, send(1)...)
			eventually(t, "the line after the interval", func() bool { return len(paths(t, file)) == len(want) })

			w.load(inSite(site, buffered(file, "flush_interval 1h\nsize 4KiB")))
			sent = send(20)
			if got := len(paths(t, file)) - len(want); got == 0 || got == len(sent) {
				t.Errorf("a full buffer has written %d of %d lines", got, len(sent))
			}
			w.load(inSite(site, buffered(file, "size 4KiB\nflush_interval 1h")))
			if got := len(paths(t, file)) - len(want); got == len(sent) {
				t.Error("a reload that does not change the buffer has emptied it")
			}
			config, _, err := adapt("{\nadmin off\npersist_config off\n}\n"+inSite(site, buffered(file, "size 1")), "Caddyfile")
			if err != nil {
				t.Fatal(err)
			}
			config = bytes.Replace(config, []byte(`"handler":"async_proxy"`), []byte(`"handler":"nonsense"`), 1)
			written := len(paths(t, file))
			if err := caddy.Load(config, true); err == nil {
				t.Fatal("the config is not rejected")
			}
			if len(paths(t, file)) != written {
				t.Error("a rejected config has emptied the buffer")
			}
			want = append(want, sent...)
			sent = send(1)
			if got := len(paths(t, file)); got == len(want)+1 {
				t.Error("a rejected config has changed the buffer")
			}
			want = append(want, sent...)
			if err := caddy.Stop(); err != nil {
				t.Fatal(err)
			}
			expect("after Caddy has stopped")

			w.load(inSite(site, buffered(file, "flush_interval 1h"))) // Caddy still has the writer
			sent = send(1)
			expect("before the interval, after Caddy has started again")
			if err := caddy.Stop(); err != nil {
				t.Fatal(err)
			}
			want = append(want, sent...)
			expect("after Caddy has stopped again")
			w.load(site) // which the world's cleanup stops
		})
	}
}

// A file has one writer, whatever the configs say one after the other, so that it can be rotated. One that
// Caddy has opened without a buffer does not get one, and operators learn that.
func TestLogBufferAndFile(t *testing.T) {
	w := newWorld(t, "", nil)
	for _, first := range []string{"file", "buffer"} {
		t.Run(first+" first", func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "access.log")
			plain, buffer := inSite(w.site(""), "\tlog {\n\t\toutput file "+file+"\n\t}\n"), inSite(w.site(""), buffered(file, "flush_interval 1h"))
			expect := func(what string, inFile, want int, warnings ...string) {
				t.Helper()
				w.gets(w.proxy, http.StatusOK)
				eventually(t, what, func() bool { return len(paths(t, file)) == inFile })
				w.load(w.site("")) // writes what is in the buffer
				if got := len(paths(t, file)); got != want {
					t.Errorf("%s: %d lines in the end, want %d", what, got, want)
				}
				if n := descriptorsOf(t, file); n != 1 {
					t.Errorf("%s: the file is open %d times", what, n)
				}
			}
			if first == "file" {
				w.load(plain)
				expect("a file", 1, 1)
				w.load(buffer)
				if found := checkWarnings(t, "a buffer that comes too late", "log_not_buffered"); !strings.Contains(found[0].Text, "no effect on "+file+", because") {
					t.Errorf("%q", found[0].Text)
				}
				expect("a buffer that comes too late", 2, 2)
				w.load(buffer)
				w.load(plain)
				checkWarnings(t, "the file again, without a buffer")
			} else {
				w.load(buffer)
				checkWarnings(t, "a buffer")
				expect("a buffer", 0, 1)
				w.load(plain)
				expect("the file without the buffer", 2, 2)
			}
			w.load(plain)
			expect("the file again", 3, 3)
		})
	}
}

// descriptorsOf returns how many of this process's descriptors are for a file.
func descriptorsOf(t *testing.T, file string) (n int) {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range links {
		if path, err := os.Readlink(link); err == nil && path == file {
			n++
		}
	}
	return n
}

// The lines in the buffer are written when Caddy exits, as are those about its exit.
func TestBinaryLogBufferAtExit(t *testing.T) {
	file := filepath.Join(t.TempDir(), "buffered.log")
	c := binaryStart(t, binaryOptions{})
	c.write(strings.Replace(c.caddyfile(""), "output file "+c.logs, "output async_proxy_buffer {\nwrap file "+file+" {\nmode 0640\n}\nflush_interval 1h\n}", 1))
	if output, err := c.command("reload", "--config", c.config, "--adapter", "caddyfile", "--address", c.admin).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	text := func() string {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if text() != "" {
		t.Errorf("written at once:\n%s", text())
	}
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case <-c.exited:
	case <-time.After(patience):
		t.Fatal("Caddy has not exited")
	}
	for _, line := range []string{`"async-proxy listening"`, `"shutdown complete"`} {
		if !strings.Contains(text(), line) {
			t.Errorf("no line %s in\n%s", line, text())
		}
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestLogBufferCaddyfile(t *testing.T) {
	output := func(text string) string {
		return ":8080 {\n\tlog {\n\t\toutput async_proxy_buffer " + text + "\n\t}\n\tasync_proxy\n}\n"
	}
	for text, want := range map[string]string{
		"{\nwrap stdout\n}": `{"output":"async_proxy_buffer","wrap":{"output":"stdout"}}`,
		"{\nsize 1MiB\nwrap stderr\nflush_interval 100ms\n}":     `{"flush_interval":100000000,"output":"async_proxy_buffer","size":1048576,"wrap":{"output":"stderr"}}`,
		"{\nwrap file /tmp/a.log {\nroll_disabled\n}\nsize 1\n}": `{"output":"async_proxy_buffer","size":1,"wrap":{"filename":"/tmp/a.log","output":"file","roll":false}}`,
	} {
		config, _, err := adapt(output(text), "Caddyfile")
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		var c struct {
			Logging struct {
				Logs map[string]struct{ Writer json.RawMessage }
			}
		}
		if err := json.Unmarshal(config, &c); err != nil {
			t.Fatal(err)
		}
		if got := string(c.Logging.Logs["log0"].Writer); got != want {
			t.Errorf("%s is %s, want %s", text, got, want)
		}
	}
	const (
		outputs  = "expected file <path>, stdout or stderr"
		sizes    = "expected a size from 1B to 1MiB"
		interval = "expected a duration above zero, such as 1s"
	)
	for text, want := range map[string]string{
		"":                               "wrap: the option is missing; " + outputs + ", at Caddyfile:3",
		"{\n}":                           "wrap: the option is missing; " + outputs + ", at Caddyfile:3",
		"file /tmp/a.log":                "unexpected argument 'file'; expected a block with wrap <output>, at Caddyfile:3",
		"{\nsize 1KiB\n}":                "wrap: the option is missing; " + outputs + ", at Caddyfile:5",
		"{\nwrap\n}":                     "wrap: missing value; " + outputs + ", at Caddyfile:4",
		"{\nwrap net udp/127.0.0.1:9\n}": "wrap: the value 'net' is not valid; " + outputs + ", at Caddyfile:4",
		"{\nwrap file\n}":                "wrap file: the file has no name; " + outputs + ", at Caddyfile:4",
		"{\nwrap file \"\"\n}":           "wrap file: the file has no name; " + outputs + ", at Caddyfile:4",
		"{\nwrap file /tmp/a /tmp/b\n}":  "wrap file: unexpected value '/tmp/b'; " + outputs + ", at Caddyfile:4",
		"{\nwrap file /tmp/a {\nroll_size x\n}\n}": "wrap file: parsing size: strconv.ParseFloat: parsing \"\": invalid syntax, at Caddyfile:5",
		"{\nwrap stdout stderr\n}":                 "wrap: unexpected value 'stderr'; " + outputs + ", at Caddyfile:4",
		"{\nwrap stdout {\nx\n}\n}":                "wrap: unexpected block; " + outputs + ", at Caddyfile:4",
		"{\nwrap stdout\nwrap stdout\n}":           "wrap: the option is set twice; expected it once, at Caddyfile:5",
		"{\nwrap stdout\nsize\n}":                  "size: missing value; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nsize 0\n}":                "size: the value '0' is not valid; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nsize 1025KiB\n}":          "size: the value '1025KiB' is not valid; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nsize 16EiB\n}":            "size: the value '16EiB' is not valid; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nsize -1\n}":               "size: the value '-1' is not valid; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nsize much\n}":             "size: the value 'much' is not valid; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nsize 1 KiB\n}":            "size: unexpected value 'KiB'; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nsize 1 {\nx\n}\n}":        "size: unexpected block; " + sizes + ", at Caddyfile:5",
		"{\nwrap stdout\nflush_interval 0\n}":      "flush_interval: the value '0' is not valid; " + interval + ", at Caddyfile:5",
		"{\nwrap stdout\nflush_interval -1s\n}":    "flush_interval: the value '-1s' is not valid; " + interval + ", at Caddyfile:5",
		"{\nwrap stdout\nflush_interval 5\n}":      "flush_interval: the value '5' is not valid; " + interval + ", at Caddyfile:5",
		"{\nwrap stdout\nflush 1s\n}":              "unrecognized option 'flush'; expected wrap, size or flush_interval, at Caddyfile:5",
	} {
		if _, _, err := adapt(output(text), "Caddyfile"); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

func TestLogBufferJSON(t *testing.T) {
	for text, want := range map[string]string{
		`{"size": 1}`: "wrap: the option is missing; expected file <path>, stdout or stderr",
		`{"wrap": {"output": "net", "address": "udp/127.0.0.1:9"}}`:                "wrap: the value 'net' is not valid; expected file <path>, stdout or stderr",
		`{"wrap": {"output": "async_proxy_buffer", "wrap": {"output": "stdout"}}}`: "wrap: the value 'async_proxy_buffer' is not valid; expected file <path>, stdout or stderr",
		`{"wrap": {"output": "paper"}}`:                                            "wrap: loading module 'paper': unknown module: caddy.logging.writers.paper; expected file <path>, stdout or stderr",
		`{"wrap": null}`:                                                           "wrap: the option is missing; expected file <path>, stdout or stderr",
		`{"wrap": {}}`:                                                             "wrap: the option is missing; expected file <path>, stdout or stderr",
		`{"wrap": { }}`:                                                            "wrap: the option is missing; expected file <path>, stdout or stderr",
		`{"wrap": "file"}`:                                                         "expected file <path>, stdout or stderr",
		`{"wrap": {"output": "file"}}`:                                             "wrap: the file has no name; expected file <path>, stdout or stderr",
		`{"wrap": {"output": "file", "filename": "/dev/null/x"}}`:                  "opening log writer using async_proxy_buffer for /dev/null/x: ",
		`{"wrap": {"output": "stdout"}, "size": -1}`:                               "size: the value '-1' is not valid; expected a number of bytes from 1 to 1048576",
		`{"wrap": {"output": "stdout"}, "size": 1048577}`:                          "size: the value '1048577' is not valid; expected a number of bytes from 1 to 1048576",
		`{"wrap": {"output": "stdout"}, "flush_interval": -1}`:                     "flush_interval: the value '-1ns' is not valid; expected a duration above zero",
		`{"wrap": {"output": "stdout"}, "size": 1, "flush_interval":1}`:            "",
	} {
		config := fmt.Sprintf(`{"admin": {"disabled": true}, "logging": {"logs": {"x": {"writer": %s}}}}`,
			strings.Replace(text, "{", `{"output": "async_proxy_buffer", `, 1))
		var c caddy.Config
		if err := json.Unmarshal([]byte(config), &c); err != nil {
			t.Fatalf("%s: %v", config, err)
		}
		err := caddy.Validate(&c)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
}

// Two logs of one config that share a file must agree on its output. Those of two configs need not.
func TestLogBufferConflicts(t *testing.T) {
	file := filepath.Join(t.TempDir(), "shared.log")
	config := func(outputs ...string) string {
		var logs []string
		for i, output := range outputs {
			logs = append(logs, fmt.Sprintf(`"log%d": {"writer": {"output": "async_proxy_buffer", %s}}`, i, output))
		}
		return fmt.Sprintf(`{"admin": {"disabled": true}, "logging": {"logs": {%s}}}`, strings.Join(logs, ", "))
	}
	wrap := fmt.Sprintf(`"wrap": {"output": "file", "filename": %q`, file)
	for second, want := range map[string]string{
		wrap + "}":                             "",
		wrap + "}, \"size\": 65536":            "",
		wrap + "}, \"size\": 4096":             "two logs of " + file + " have different sizes, ",
		wrap + "}, \"flush_interval\": \"5s\"": "two logs of " + file + " have different flush intervals, ",
		wrap + ", \"roll_size_mb\": 5}":        "two logs of " + file + " wrap it differently, as ",
		"\"wrap\": {\"output\": \"stdout\"}":   "",
	} {
		for range 4 { // Caddy opens the logs in a random order
			var c caddy.Config
			if err := json.Unmarshal([]byte(config(wrap+"}", second)), &c); err != nil {
				t.Fatal(err)
			}
			err := caddy.Validate(&c)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "expected the same output for both")) {
				t.Errorf("%s: %v, want %q", second, err, want)
			}
		}
	}
}

// Lines that cannot be written are lost, and standard error says so once, and once more with those lost since when
// Caddy exits.
func TestBinaryLogBufferLoses(t *testing.T) {
	for options, times := range map[string]int{
		"flush_interval 1h": 1, // the first write is the one at exit
		"size 1":            2,
	} {
		t.Run(options, func(t *testing.T) { logBufferLoses(t, options, times) })
	}
}

func logBufferLoses(t *testing.T, options string, times int) {
	config, address := filepath.Join(t.TempDir(), "Caddyfile"), freeAddress(t)
	text := "{\n\tadmin off\n\tpersist_config off\n\tlog {\n\t\toutput async_proxy_buffer {\n\t\t\twrap file /dev/full\n\t\t\t" + options + "\n\t\t}\n\t}\n}\nhttp://" + address + " {\n\tasync_proxy\n}\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := commandOf(t, "run", "--config", config, "--adapter", "caddyfile")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "Caddy to run", func() bool { return binaryListens(address) })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	output, err := io.ReadAll(stderr)
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	const says = "async_proxy_buffer: writing to /dev/full fails, and log lines are lost until it works again, "
	if n := strings.Count(string(output), says); n != times || !strings.Contains(string(output), "no space left on device") {
		t.Errorf("said %d times, want %d:\n%s", n, times, output)
	}
}

func TestLogBufferDefaults(t *testing.T) {
	b := LogBuffer{WrapRaw: json.RawMessage(`{"output": "stdout"}`)}
	ctx, cancel := caddy.NewContext(caddy.Context{Context: t.Context()})
	defer cancel()
	if err := b.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Cleanup() }()
	if b.Size != 64<<10 || b.FlushInterval != caddy.Duration(time.Second) {
		t.Errorf("size %d, flush interval %s", b.Size, time.Duration(b.FlushInterval))
	}
}
