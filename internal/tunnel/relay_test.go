// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package tunnel

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/internal/conntest"
	"github.com/asyncproxy/caddy-async-proxy/internal/tcpconn"
)

// relayRig is a running relay: what is written to in comes out of out.
type relayRig struct {
	in, out net.Conn // the outer ends
	dst     net.Conn // the inner end towards the destination, for the test to close
	copied  flow
	result  chan relayResult
}

type relayResult struct{ readErr, writeErr error }

// connPair returns the two ends of a connection.
type connPair func(t testing.TB) (inside, outside net.Conn)

// relayKinds are the combinations of ends that a relay handles. Only sockets can be
// spliced.
var relayKinds = []struct {
	name     string
	src, dst connPair
}{
	{"socket to socket", conntest.Pair, conntest.Pair},
	{"socket to pipe", conntest.Pair, pipePair},
	{"socket to TLS", conntest.Pair, tlsPair},
	{"TLS to socket", tlsPair, conntest.Pair},
	{"TLS to TLS", tlsPair, tlsPair},
	{"pipe to socket", pipePair, conntest.Pair},
	{"pipe to pipe", pipePair, pipePair},
}

func newRelayRig(t testing.TB, src, dst connPair) *relayRig {
	t.Helper()
	rig := &relayRig{result: make(chan relayResult, 1)}
	var from net.Conn
	from, rig.in = src(t)
	rig.dst, rig.out = dst(t)
	go rig.run(rig.dst, from)
	return rig
}

func (r *relayRig) run(dst, src net.Conn) {
	var res relayResult
	res.readErr, res.writeErr = relay(dst, src, &r.copied)
	r.result <- res
}

func pipePair(t testing.TB) (inside, outside net.Conn) {
	inside, outside = net.Pipe()
	t.Cleanup(func() { inside.Close(); outside.Close() })
	return inside, outside
}

func tlsPair(t testing.TB) (inside, outside net.Conn) {
	t.Helper()
	inside, outside = conntest.Pair(t)
	inside = tls.Server(inside, &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}})
	outside = tls.Client(outside, &tls.Config{InsecureSkipVerify: true})
	done := make(chan error, 1)
	go func() { done <- inside.(*tls.Conn).Handshake() }()
	if err := errors.Join(outside.(*tls.Conn).Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return inside, outside
}

func selfSigned(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(cryptorand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// end half-closes a connection.
func end(conn net.Conn) error {
	if half, ok := conn.(tcpconn.HalfCloser); ok {
		return half.CloseWrite()
	}
	return conn.Close()
}

// inChunks returns r's data in chunks of random sizes up to most.
type inChunks struct {
	r    io.Reader
	most int
	rng  *rand.Rand
}

func (c *inChunks) Read(b []byte) (int, error) {
	return c.r.Read(b[:min(len(b), 1+c.rng.IntN(c.most))])
}

// The sizes are at the boundaries of full buffers.
func TestRelay(t *testing.T) {
	inPieces, bulk := int64(1<<20), int64(16<<20) // a system call for every few bytes of more would take too long
	if conntest.Race {
		inPieces, bulk = 128<<10, 4<<20
	}
	sizes := []int64{0, 1, 1023, 1024, 1025, 4095, 4096, 4097, 8192, 32767, 32768, 32769, 65535, 65536, 65537, inPieces, bulk}
	for _, kind := range relayKinds {
		for _, size := range sizes {
			for _, most := range []int{1 << 20, 5000, 37} {
				if size > inPieces && most < 5000 {
					continue
				}
				t.Run(fmt.Sprintf("%s/%d bytes in chunks of %d", kind.name, size, most), func(t *testing.T) {
					rig := newRelayRig(t, kind.src, kind.dst)
					go func() {
						data := &inChunks{conntest.Bulk(1, size), most, rand.New(rand.NewPCG(1, uint64(size)))}
						if n, err := io.CopyBuffer(struct{ io.Writer }{rig.in}, data, make([]byte, 1<<20)); err != nil {
							t.Errorf("sending %d bytes of %d: %v", n, size, err)
						}
						end(rig.in)
					}()
					received := make(chan struct{})
					go func() {
						conntest.ReceiveBulk(t, "the other side", rig.out, 1, size)
						close(received)
					}()
					res := <-rig.result
					if res.readErr != io.EOF || res.writeErr != nil {
						t.Errorf("the relay ended with %v, %v; want EOF", res.readErr, res.writeErr)
					}
					if n := rig.copied.Load(); n != size {
						t.Errorf("the relay counted %d bytes, want %d", n, size)
					}
					end(rig.dst)
					<-received
				})
			}
		}
	}
}

// Data is passed on at once, whatever the size of the buffers.
func TestRelayDoesNotWaitForMore(t *testing.T) {
	for _, kind := range relayKinds {
		t.Run(kind.name, func(t *testing.T) {
			rig := newRelayRig(t, kind.src, kind.dst)
			total := int64(0)
			for _, size := range []int64{1, 1023, 1024, 1025, 1, 4095, 4096, 4097, 1, 32768, 65536, 3} {
				go io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(byte(size), size))
				conntest.ReceiveBulk(t, "the other side", io.LimitReader(rig.out, size), byte(size), size)
				total += size
			}
			end(rig.in)
			<-rig.result
			if n := rig.copied.Load(); n != total {
				t.Errorf("the relay counted %d bytes, want %d", n, total)
			}
		})
	}
}

// A destination that does not read stops the source after what the kernel and one pipe or
// buffer hold.
func TestRelayWaitsForASlowDestination(t *testing.T) {
	const kernel = 64 << 10
	size := 64 << 20
	if conntest.Race {
		size = 16 << 20
	}
	for _, kind := range relayKinds {
		t.Run(kind.name, func(t *testing.T) {
			small := func(pair connPair) connPair {
				return func(t testing.TB) (net.Conn, net.Conn) {
					inside, outside := pair(t)
					for _, conn := range []net.Conn{inside, outside} {
						if tcp := tcpconn.Of(conn); tcp != nil {
							tcp.SetReadBuffer(kernel)
							tcp.SetWriteBuffer(kernel)
						}
					}
					return inside, outside
				}
			}
			rig := newRelayRig(t, small(kind.src), small(kind.dst))
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)

			data := make([]byte, size)
			io.ReadFull(conntest.Bulk(1, int64(size)), data)
			taken := make(chan int, 1)
			var wrote atomic.Int64
			go func() {
				for rest := data; len(rest) > 0; {
					n, err := rig.in.Write(rest[:min(len(rest), 16<<10)])
					rest = rest[n:]
					wrote.Add(int64(n))
					if err != nil {
						t.Errorf("sending: %v", err)
						break
					}
				}
				end(rig.in)
				taken <- int(wrote.Load())
			}()
			for last := int64(-1); last != wrote.Load(); time.Sleep(200 * time.Millisecond) {
				last = wrote.Load()
			}
			if n := wrote.Load(); n > 4<<20 {
				t.Errorf("the source wrote %d bytes to a destination that does not read", n)
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc) - int64(size); grown > 1<<20 {
				t.Errorf("the heap grew by %d bytes", grown)
			}
			received := make(chan struct{})
			go func() {
				conntest.ReceiveBulk(t, "the other side", rig.out, 1, int64(size))
				close(received)
			}()
			<-rig.result
			end(rig.dst)
			<-received
		})
	}
}

func TestRelayReportsSourceError(t *testing.T) {
	for _, kind := range relayKinds {
		for _, size := range []int64{0, 1, 4096, 1 << 20} {
			t.Run(fmt.Sprintf("%s/after %d bytes", kind.name, size), func(t *testing.T) {
				rig := newRelayRig(t, kind.src, kind.dst)
				go io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(1, size))
				conntest.ReceiveBulk(t, "the other side", io.LimitReader(rig.out, size), 1, size)
				NewConnEnd(rig.in).Abort()
				res := <-rig.result
				if res.writeErr != nil || res.readErr == nil || res.readErr == io.EOF && tcpconn.Of(rig.in) != nil {
					t.Errorf("the relay ended with %v, %v; want a source error", res.readErr, res.writeErr)
				}
				if n := rig.copied.Load(); n != size {
					t.Errorf("the relay counted %d bytes, want %d", n, size)
				}
			})
		}
	}
}

func TestRelayReportsDestinationError(t *testing.T) {
	const size = 64 << 20
	for _, kind := range relayKinds {
		for _, before := range []int64{0, 1, 1 << 20} {
			t.Run(fmt.Sprintf("%s/after %d bytes", kind.name, before), func(t *testing.T) {
				rig := newRelayRig(t, kind.src, kind.dst)
				sent := make(chan int64)
				go func() {
					n, _ := io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(1, size))
					sent <- n
				}()
				conntest.ReceiveBulk(t, "the other side", io.LimitReader(rig.out, before), 1, before)
				NewConnEnd(rig.out).Abort()
				if res := <-rig.result; res.writeErr == nil || res.readErr != nil {
					t.Errorf("the relay ended with %v, %v; want a destination error", res.readErr, res.writeErr)
				}
				NewConnEnd(rig.in).Abort() // stops the sender
				n := <-sent
				if copied := rig.copied.Load(); copied < before || copied > n+16<<10 { // TLS: one record is in flight
					t.Errorf("the relay counted %d bytes; %d were received and %d sent", copied, before, n)
				}
			})
		}
	}
}

// Bytes that the destination has not accepted are not counted.
func TestRelayCountsAcceptedBytes(t *testing.T) {
	const sent, taken = 1000, 10
	for _, src := range []connPair{conntest.Pair, pipePair} {
		rig := newRelayRig(t, src, pipePair)
		go io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(1, sent))
		io.CopyN(io.Discard, rig.out, taken)
		rig.out.Close()
		<-rig.result
		if n := rig.copied.Load(); n != taken {
			t.Errorf("the relay counted %d bytes, want %d", n, taken)
		}
	}
}

// A relay that failed midway leaves no bytes to the next one.
func TestRelayAfterFailures(t *testing.T) {
	for range 50 {
		rig := newRelayRig(t, conntest.Pair, conntest.Pair)
		go io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(9, 16<<20))
		io.CopyN(io.Discard, rig.out, 1<<20)
		NewConnEnd(rig.out).Abort()
		<-rig.result
		rig.in.Close()
	}
	rig := newRelayRig(t, conntest.Pair, conntest.Pair)
	go func() {
		io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(1, 16<<20))
		end(rig.in)
	}()
	go func() {
		<-rig.result
		end(rig.dst)
	}()
	conntest.ReceiveBulk(t, "the other side", rig.out, 1, 16<<20)
}

// Closing either end from outside, as limits do, ends a blocked relay.
func TestRelayEndsWhenItsEndsAreClosed(t *testing.T) {
	for _, kind := range relayKinds {
		t.Run(kind.name+"/source", func(t *testing.T) {
			from, _ := kind.src(t)
			to, _ := kind.dst(t)
			done := make(chan error)
			var copied flow
			go func() {
				err, _ := relay(to, from, &copied)
				done <- err
			}()
			from.Close()
			if err := <-done; !errors.Is(err, net.ErrClosed) && err != io.ErrClosedPipe {
				t.Errorf("the relay ended with %v, want a closed source", err)
			}
		})
		t.Run(kind.name+"/destination", func(t *testing.T) {
			rig := newRelayRig(t, kind.src, kind.dst)
			go io.Copy(struct{ io.Writer }{rig.in}, conntest.Bulk(1, 64<<20))
			io.CopyN(io.Discard, rig.out, 100)
			rig.dst.Close()
			if res := <-rig.result; res.writeErr == nil {
				t.Errorf("the relay ended with %v, %v; want a write error", res.readErr, res.writeErr)
			}
		})
	}
}

// A deadline on the source is an error like any other.
func TestRelayWithADeadline(t *testing.T) {
	for _, kind := range relayKinds {
		t.Run(kind.name, func(t *testing.T) {
			from, _ := kind.src(t)
			to, _ := kind.dst(t)
			from.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			var copied flow
			if err, _ := relay(to, from, &copied); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the relay ended with %v, want the deadline", err)
			}
		})
	}
}
