// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package linebuffer

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A recorder keeps what each call of Write got.
type recorder struct {
	mu     sync.Mutex
	writes []string
	err    error // of each call
	closed int
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writes = append(r.writes, string(p))
	return len(p), r.err
}

func (r *recorder) Close() error { r.closed++; return nil }

func (r *recorder) expect(t *testing.T, writes ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.writes, writes) {
		t.Errorf("written: %q, want %q", r.writes, writes)
	}
}

// buffering returns a Writer with a buffer.
func buffering(r *recorder, size int, delay time.Duration) *Writer {
	w := New(r)
	w.SetBuffer(size, delay)
	return w
}

// write writes lines, and returns the first error.
func write(t *testing.T, w *Writer, lines ...string) (err error) {
	t.Helper()
	for _, line := range lines {
		n, e := w.Write([]byte(line))
		if n != len(line) {
			t.Errorf("%q: took %d bytes", line, n)
		}
		if err == nil {
			err = e
		}
	}
	return err
}

func TestFullBuffer(t *testing.T) {
	for _, tc := range []struct {
		name          string
		lines, writes []string // the buffer has 10 bytes
	}{
		{"less", []string{"1234\n", "567\n"}, nil},
		{"exactly", []string{"1234\n", "5678\n"}, nil},
		{"one more", []string{"1234\n", "5678\n", "\n"}, []string{"1234\n5678\n"}},
		{"a line that does not fit", []string{"123456\n", "789\n", "0\n"}, []string{"123456\n"}},
		{"a line as long as the buffer", []string{"1\n", "123456789\n"}, []string{"1\n"}},
		{"a longer line", []string{"1\n", "1234567890\n", "2\n"}, []string{"1\n", "1234567890\n"}},
		{"a longer line first", []string{"1234567890\n", "2\n"}, []string{"1234567890\n"}},
		{"nothing", []string{"", "1\n", ""}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var r recorder
			w := buffering(&r, 10, time.Hour)
			if err := write(t, w, tc.lines...); err != nil {
				t.Error(err)
			}
			r.expect(t, tc.writes...)
			if err := w.Close(); err != nil || r.closed != 1 {
				t.Errorf("closed %d times: %v", r.closed, err)
			}
			if got, want := strings.Join(r.writes, ""), strings.Join(tc.lines, ""); got != want {
				t.Errorf("written in the end: %q, want %q", got, want)
			}
		})
	}
}

func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := buffering(&r, 100, time.Second)
		time.Sleep(time.Hour) // an empty buffer is not written
		r.expect(t)
		_ = write(t, w, "1\n")
		time.Sleep(time.Second - 1)
		_ = write(t, w, "2\n") // does not prolong the delay of the first
		r.expect(t)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		r.expect(t, "1\n2\n")
		_ = write(t, w, "3\n")
		time.Sleep(time.Second)
		synctest.Wait()
		r.expect(t, "1\n2\n", "3\n")
	})
}

// A buffer that has been written because it was full has a new delay.
func TestDelayBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := buffering(&r, 4, time.Second)
		_ = write(t, w, "1\n", "2\n")
		time.Sleep(time.Second / 2)
		_ = write(t, w, "3\n")
		r.expect(t, "1\n2\n")
		time.Sleep(time.Second/2 + 1)
		synctest.Wait()
		r.expect(t, "1\n2\n")
		time.Sleep(time.Second / 2)
		synctest.Wait()
		r.expect(t, "1\n2\n", "3\n")
	})
}

func TestSetBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := New(&r)
		_ = write(t, w, "1\n")
		r.expect(t, "1\n")
		w.SetBuffer(100, time.Second)
		_ = write(t, w, "2\n")
		time.Sleep(time.Second / 2)
		w.SetBuffer(100, time.Second) // changes nothing
		_ = write(t, w, "3\n")
		r.expect(t, "1\n")
		time.Sleep(time.Second / 2)
		synctest.Wait()
		r.expect(t, "1\n", "2\n3\n")
		_ = write(t, w, "4\n")
		w.SetBuffer(4, time.Hour)
		r.expect(t, "1\n", "2\n3\n", "4\n")
		_ = write(t, w, "5\n")
		time.Sleep(time.Minute)
		_ = write(t, w, "6\n", "7\n")
		r.expect(t, "1\n", "2\n3\n", "4\n", "5\n6\n")
		w.SetBuffer(0, 0)
		_ = write(t, w, "8\n")
		r.expect(t, "1\n", "2\n3\n", "4\n", "5\n6\n", "7\n", "8\n")
	})
}

func TestLinesAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var r recorder
		w := buffering(&r, 100, time.Second)
		_ = write(t, w, "1\n")
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		_ = write(t, w, "2\n")
		r.expect(t, "1\n", "2\n")
		time.Sleep(time.Hour)
		synctest.Wait()
		r.expect(t, "1\n", "2\n")
	})
}

// An error is returned once, by whatever comes next, and the lines that could not be written do not
// stay in the buffer.
func TestErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := errors.New("disk full")
		r := recorder{err: full}
		w := buffering(&r, 4, time.Second)
		if err := write(t, w, "1\n", "2\n"); err != nil {
			t.Errorf("nothing has been written, but: %v", err)
		}
		if err := write(t, w, "3\n"); !errors.Is(err, full) {
			t.Errorf("when the buffer is full: %v", err)
		}
		if err := write(t, w, "4\n"); err != nil {
			t.Errorf("the error again: %v", err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if err := write(t, w, "5\n"); !errors.Is(err, full) {
			t.Errorf("after the delay: %v", err)
		}
		if err := write(t, w, "long line\n"); !errors.Is(err, full) {
			t.Errorf("a long line: %v", err)
		}
		_ = write(t, w, "6\n")
		if err := w.Close(); !errors.Is(err, full) || r.closed != 1 {
			t.Errorf("closed %d times: %v", r.closed, err)
		}
		r.expect(t, "1\n2\n", "3\n4\n", "5\n", "long line\n", "6\n")
		if err := write(t, w, "7\n"); !errors.Is(err, full) {
			t.Errorf("after Close: %v", err)
		}
	})
}

// Every line arrives whole and once, and those of one goroutine in their order, whatever makes the
// buffer be written.
func TestConcurrency(t *testing.T) {
	var r recorder
	w := buffering(&r, 100, 50*time.Microsecond)
	const goroutines, lines = 8, 2000
	var group sync.WaitGroup
	for g := range goroutines {
		group.Go(func() {
			for i := range lines {
				_ = write(t, w, fmt.Sprintf("%d %s%d\n", g, strings.Repeat(" ", i%120), i))
			}
		})
	}
	group.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var next [goroutines]int
	for line := range strings.Lines(strings.Join(r.writes, "")) {
		var g, i int
		if _, err := fmt.Sscan(line, &g, &i); err != nil || i != next[g] {
			t.Fatalf("%q instead of line %d: %v", line, next[g], err)
		}
		next[g]++
	}
	for g, n := range next {
		if n != lines {
			t.Errorf("%d lines of goroutine %d", n, g)
		}
	}
}
