// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/asyncproxy/caddy-async-proxy/bench/internal/wire"
)

// open connects to the server and opens a tunnel.
func (c *client) open() error {
	if err := c.dial(); err != nil {
		return err
	}
	if _, err := c.conn.Write(c.request); err != nil {
		return err
	}
	head, err := c.reader.head()
	if err != nil {
		return err
	}
	if head.status != 200 {
		return wrongStatus(head.status, 200)
	}
	if len(c.reader.unread) > 0 {
		return errors.New("the answer to CONNECT has content")
	}
	return nil
}

// openAndClose opens a tunnel and closes it.
func (c *client) openAndClose() (int, error) {
	if err := c.open(); err != nil {
		return 0, err
	}
	c.hangUp()
	return 0, nil
}

// download opens a tunnel and reads what the origin sends until the measurement is over.
// It counts the bytes itself, and returns none.
func (c *client) download() (int, error) {
	if err := c.order(wire.Download); err != nil {
		return 0, err
	}
	var at int64
	for phase := c.phase.Load(); phase != over; phase = c.phase.Load() {
		n, err := c.conn.Read(c.reader.buf)
		if err != nil {
			return 0, err
		}
		if !wire.Same(c.reader.buf[:n], at) {
			return 0, fmt.Errorf("wrong content at byte %d of a tunnel", at)
		}
		at += int64(n)
		if phase == measuring {
			c.note()
			c.result.Bytes += int64(n)
		}
	}
	return 0, nil
}

// sendAll opens a tunnel and sends to the origin until the measurement is over. The origin
// counts the bytes.
func (c *client) sendAll() (int, error) {
	if err := c.order(wire.Upload); err != nil {
		return 0, err
	}
	content := wire.Content(wire.Whole(len(c.reader.buf)))
	for c.phase.Load() != over {
		if _, err := c.conn.Write(content); err != nil {
			return 0, err
		}
	}
	return 0, nil
}

// order opens a tunnel and tells the origin what it is for.
func (c *client) order(command byte) error {
	if err := c.open(); err != nil {
		return err
	}
	_, err := c.conn.Write([]byte{command})
	return err
}

// Tunnels are open tunnels without traffic.
type Tunnels struct {
	mu    sync.Mutex
	conns []net.Conn
	errs  []error
}

// OpenTunnels opens n tunnels, and sends one byte through each and back.
func OpenTunnels(target Target, n int) (*Tunnels, error) {
	server, err := loopback(target)
	if err != nil {
		return nil, err
	}
	tunnels := &Tunnels{}
	var openers sync.WaitGroup
	const together = 16
	for i := range together {
		openers.Go(func() {
			for j := i; j < n; j += together {
				c := client{run: &run{server: server, request: connectTo(target.Origin)}, source: sourceOf(j)}
				c.deadline = time.Now().Add(grace)
				c.reader.buf = make([]byte, 4<<10)
				tunnels.keep(c.echo(), &c)
			}
		})
	}
	openers.Wait()
	return tunnels, errors.Join(tunnels.errs...)
}

// echo opens a tunnel and sends one byte through it and back.
func (c *client) echo() error {
	if err := c.order(wire.Echo); err != nil {
		return err
	}
	if _, err := c.conn.Write([]byte{'!'}); err != nil {
		return err
	}
	n, err := c.conn.Read(c.reader.buf)
	if err == nil && (n != 1 || c.reader.buf[0] != '!') {
		err = fmt.Errorf("%q came back through a tunnel", c.reader.buf[:n])
	}
	if err != nil {
		return err
	}
	return c.conn.SetDeadline(time.Time{})
}

// keep keeps the connection of a client.
func (t *Tunnels) keep(err error, c *client) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c.conn != nil {
		t.conns = append(t.conns, c.conn)
	}
	if err != nil && len(t.errs) < 3 {
		t.errs = append(t.errs, err)
	}
}

// Len returns how many tunnels are open.
func (t *Tunnels) Len() int { return len(t.conns) }

// Close closes all tunnels.
func (t *Tunnels) Close() {
	for _, conn := range t.conns {
		conn.Close()
	}
}
