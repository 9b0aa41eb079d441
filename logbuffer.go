// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/logging"
	"github.com/dustin/go-humanize"

	"github.com/asyncproxy/caddy-async-proxy/internal/linebuffer"
)

func init() { caddy.RegisterModule(LogBuffer{}) }

// LogBuffer is an output for logs that collects lines and writes many at once to the output that it
// wraps. Caddy's own outputs write each line by itself, which takes about a tenth of the CPU time
// of a short request that is logged twice.
//
// A line reaches the wrapped output when the buffer is full, FlushInterval after the first line in
// the buffer, and before Caddy exits or unloads the config. If the process is killed or crashes, and on
// SIGQUIT or a second Ctrl+C, the lines in the buffer are lost. So are those that cannot be written; standard
// error then says so, and when writing works again. If it does not, it says how many are lost when the options
// change and before Caddy exits.
type LogBuffer struct {
	// The wrapped output: file, stdout or stderr. Others are refused, because some of them take each
	// write for one line.
	WrapRaw json.RawMessage `json:"wrap,omitempty" caddy:"namespace=caddy.logging.writers inline_key=output"`

	// The size of the buffer in bytes. A longer line is written by itself. Default: 65536. At most
	// 1048576, the smallest file that Caddy rotates.
	Size int `json:"size,omitempty"`

	// How long a line stays in the buffer at most. Default: 1s.
	FlushInterval caddy.Duration `json:"flush_interval,omitempty"`

	wrapped caddy.WriterOpener
	config  <-chan struct{} // closed with the config's context; the modules of one config share it
}

const (
	defaultLogBufferSize  = 64 << 10
	maxLogBufferSize      = 1 << 20
	defaultLogBufferFlush = caddy.Duration(time.Second)

	wrappable = "file <path>, stdout or stderr"
)

// CaddyModule returns the Caddy module information.
func (LogBuffer) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "caddy.logging.writers.async_proxy_buffer",
		New: func() caddy.Module { return new(LogBuffer) },
	}
}

// Provision implements caddy.Provisioner.
func (b *LogBuffer) Provision(ctx caddy.Context) error {
	var wrap map[string]json.RawMessage
	if err := json.Unmarshal(b.WrapRaw, &wrap); len(b.WrapRaw) == 0 || err == nil && len(wrap) == 0 {
		return fmt.Errorf("wrap: the option is missing; expected %s", wrappable)
	}
	module, err := ctx.LoadModule(b, "WrapRaw")
	if err != nil {
		return fmt.Errorf("wrap: %w; expected %s", err, wrappable)
	}
	switch module := module.(type) {
	case *caddy.StdoutWriter, *caddy.StderrWriter:
	case *logging.FileWriter:
		if module.Filename == "" {
			return fmt.Errorf("wrap: the file has no name; expected %s", wrappable)
		}
	default:
		return invalidValue("wrap", wrappable, module.(caddy.Module).CaddyModule().ID.Name())
	}
	setIfZero(&b.Size, defaultLogBufferSize)
	setIfZero(&b.FlushInterval, defaultLogBufferFlush)
	if b.Size < 0 || b.Size > maxLogBufferSize {
		return invalidValue("size", fmt.Sprintf("a number of bytes from 1 to %d", maxLogBufferSize), strconv.Itoa(b.Size))
	}
	if b.FlushInterval < 0 {
		return invalidValue("flush_interval", "a duration above zero", time.Duration(b.FlushInterval).String())
	}
	b.WrapRaw, b.config = caddyconfig.JSON(module, nil), ctx.Done()
	wrapped := module.(caddy.WriterOpener)
	logBuffers.mu.Lock()
	defer logBuffers.mu.Unlock()
	o := logBuffers.open[bufferKey(wrapped)]
	if o == nil {
		o = new(openLogBuffer)
	}
	for _, other := range o.configs {
		if err := b.differsFrom(other); other.config == b.config && err != nil {
			return fmt.Errorf("two logs of %s %w; expected the same output for both", wrapped, err)
		}
	}
	b.wrapped = wrapped
	logBuffers.open[b.WriterKey()] = o
	o.configs = append(o.configs, b)
	o.apply()
	return nil
}

// differsFrom returns in what the options of two outputs differ, if they do. They would share one writer, and
// the options of the one that comes first by chance would apply.
func (b *LogBuffer) differsFrom(other *LogBuffer) error {
	switch {
	case b.Size != other.Size:
		return fmt.Errorf("have different sizes, %d and %d", other.Size, b.Size)
	case b.FlushInterval != other.FlushInterval:
		return fmt.Errorf("have different flush intervals, %s and %s", time.Duration(other.FlushInterval), time.Duration(b.FlushInterval))
	case string(b.WrapRaw) != string(other.WrapRaw):
		return fmt.Errorf("wrap it differently, as %s and %s", other.WrapRaw, b.WrapRaw)
	}
	return nil
}

func (b *LogBuffer) String() string { return b.wrapped.String() }

// GoString implements fmt.GoStringer for Caddy's errors of opening an output.
func (b *LogBuffer) GoString() string { return "async_proxy_buffer for " + b.String() }

// WriterKey implements caddy.WriterOpener. Logs with the same wrapped output share a buffer. A file has
// the key that it has without a buffer, so that there is one writer for each file: of two, one would
// go on writing to a file that the other has rotated.
func (b *LogBuffer) WriterKey() string { return bufferKey(b.wrapped) }

func bufferKey(wrapped caddy.WriterOpener) string {
	key := wrapped.WriterKey()
	if _, ok := wrapped.(*logging.FileWriter); ok {
		return key
	}
	return "async_proxy_buffer:" + key
}

// OpenWriter implements caddy.WriterOpener.
func (b *LogBuffer) OpenWriter() (io.WriteCloser, error) {
	w, err := b.wrapped.OpenWriter()
	if err != nil {
		return nil, err
	}
	logBuffers.mu.Lock()
	defer logBuffers.mu.Unlock()
	o := logBuffers.open[b.WriterKey()]
	o.writer = linebuffer.New(w, reportLost(b.String()))
	o.apply()
	return o.writer, nil
}

// reportLost returns a function that says on standard error what becomes of the lines for an output. Caddy's logs
// would not do: one of them may be this output's.
func reportLost(output string) func(err error, lost int) {
	return func(err error, lost int) {
		if err != nil {
			fmt.Fprintf(os.Stderr, "async_proxy_buffer: writing to %s fails, and log lines are lost until it works again, %d so far: %v\n", output, lost, err)
		} else {
			fmt.Fprintf(os.Stderr, "async_proxy_buffer: writing to %s works again; %d log lines are lost\n", output, lost)
		}
	}
}

// Cleanup implements caddy.CleanerUpper.
func (b *LogBuffer) Cleanup() error {
	if b.wrapped == nil {
		return nil // not provisioned
	}
	logBuffers.mu.Lock()
	defer logBuffers.mu.Unlock()
	o := logBuffers.open[b.WriterKey()]
	o.configs = slices.DeleteFunc(o.configs, func(other *LogBuffer) bool { return other == b })
	o.apply()
	if o.writer == nil && len(o.configs) == 0 {
		delete(logBuffers.open, b.WriterKey())
	}
	return nil
}

// logBuffers has the state of each writer key. Caddy 2.11.9 keeps a log's writer open for as long as
// the process runs, and uses it again for the next config with the same key. Therefore the
// modules tell the writer when they come and go.
var logBuffers = struct {
	mu   sync.Mutex
	open map[string]*openLogBuffer
}{open: make(map[string]*openLogBuffer)}

type openLogBuffer struct {
	writer  *linebuffer.Writer // nil until Caddy opens it, or if it has opened the file without a buffer
	configs []*LogBuffer       // those provisioned: during a reload, the old config's and then the new one's
}

// apply gives the writer the buffer of the oldest config, so that one that is not loaded in the end has
// no effect. Without any, there is no buffer: what Caddy logs when it exits is written at once.
func (o *openLogBuffer) apply() {
	switch {
	case o.writer == nil:
	case len(o.configs) == 0:
		o.writer.SetBuffer(0, 0)
	default:
		o.writer.SetBuffer(o.configs[0].Size, time.Duration(o.configs[0].FlushInterval))
	}
}

// unbufferedLogs returns the wrapped outputs of a config that have no buffer, because Caddy has opened their files
// without one. They get it when Caddy starts again. config is the channel that is closed with the config's
// context.
func unbufferedLogs(config <-chan struct{}) (outputs []string) {
	logBuffers.mu.Lock()
	defer logBuffers.mu.Unlock()
	for _, o := range logBuffers.open {
		isIn := func(b *LogBuffer) bool { return b.config == config }
		if i := slices.IndexFunc(o.configs, isIn); o.writer == nil && i >= 0 {
			outputs = append(outputs, o.configs[i].String())
		}
	}
	slices.Sort(outputs)
	return outputs
}

// UnmarshalCaddyfile sets up the output from Caddyfile tokens. Syntax:
//
//	output async_proxy_buffer {
//		wrap           <output> ...
//		size           <size>
//		flush_interval <duration>
//	}
func (b *LogBuffer) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the output's name
	if d.NextArg() {
		return d.Errf("unexpected argument '%s'; expected a block with wrap <output>", d.Val())
	}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name, at := d.Val(), *d
		if seen[name] {
			return d.Errf("%s: the option is set twice; expected it once", name)
		}
		seen[name] = true
		var expected string
		var set func(value string) (ok bool)
		switch name {
		case "wrap":
			if err := b.wrap(d); err != nil {
				return err
			}
			continue
		case "size":
			expected = "a size from 1B to 1MiB"
			set = func(value string) bool {
				size, err := humanize.ParseBytes(value)
				b.Size = int(min(size, math.MaxInt))
				return err == nil && b.Size >= 1 && b.Size <= maxLogBufferSize
			}
		case "flush_interval":
			expected = "a duration above zero, such as 1s"
			set = func(value string) bool {
				interval, err := caddy.ParseDuration(value)
				b.FlushInterval = caddy.Duration(interval)
				return err == nil && interval > 0
			}
		default:
			return d.Errf("unrecognized option '%s'; expected wrap, size or flush_interval", name)
		}
		switch args := d.RemainingArgs(); {
		case len(args) == 0:
			return d.Errf("%s: missing value; expected %s", name, expected)
		case len(args) > 1:
			return d.Errf("%s: unexpected value '%s'; expected %s", name, args[1], expected)
		case !set(args[0]):
			return d.Errf("%v", invalidValue(name, expected, args[0]))
		}
		if err := noBlock(d, at, name, expected); err != nil {
			return err
		}
	}
	if !seen["wrap"] {
		return d.Errf("wrap: the option is missing; expected %s", wrappable)
	}
	return nil
}

// wrap parses the wrapped output.
func (b *LogBuffer) wrap(d *caddyfile.Dispenser) error {
	at := *d
	if !d.NextArg() {
		return d.Errf("wrap: missing value; expected %s", wrappable)
	}
	var output caddy.WriterOpener
	switch name := d.Val(); name {
	case "file":
		line := *d
		switch args := line.RemainingArgs(); {
		case len(args) == 0 || args[0] == "":
			return d.Errf("wrap file: the file has no name; expected %s", wrappable)
		case len(args) > 1:
			return d.Errf("wrap file: unexpected value '%s'; expected %s", args[1], wrappable)
		}
		module, err := caddyfile.UnmarshalModule(d, "caddy.logging.writers.file")
		if err != nil {
			return fmt.Errorf("wrap file: %w", err)
		}
		b.WrapRaw = caddyconfig.JSONModuleObject(module, "output", "file", nil)
		return nil
	case "stdout":
		output = caddy.StdoutWriter{}
	case "stderr":
		output = caddy.StderrWriter{}
	default:
		return d.Errf("%v", invalidValue("wrap", wrappable, name))
	}
	b.WrapRaw = caddyconfig.JSONModuleObject(output, "output", d.Val(), nil)
	if d.NextArg() {
		return d.Errf("wrap: unexpected value '%s'; expected %s", d.Val(), wrappable)
	}
	return noBlock(d, at, "wrap", wrappable)
}
