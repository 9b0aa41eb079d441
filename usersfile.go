// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/caddyauth"
	"go.uber.org/zap"

	"github.com/asyncproxy/caddy-async-proxy/internal/monotime"
)

// usersFile is a provider of the users in a file and of those of basic_auth. It reads the file again
// after a change. If the file then has a mistake, the users stay as they were, and the log says why.
type usersFile struct {
	path    string
	static  []caddyauth.Account // of basic_auth
	hash    anyHash
	realm   string
	ctx     caddy.Context
	logger  *zap.Logger
	users   atomic.Pointer[caddyauth.HTTPBasicAuth]
	checkAt atomic.Int64 // when to check the file for changes again, since epoch

	mu      sync.Mutex  // guards the following
	read    os.FileInfo // of the file when it was last read
	release func()      // of users
}

// usersFileInterval is how often the file is checked for changes, while clients send credentials.
const usersFileInterval = time.Second

// maxUsersFile is the maximum size of the file: some hundred thousand users.
const maxUsersFile = 32 << 20

// newUsersFile reads the file. static has the users of basic_auth; it may be nil.
func newUsersFile(ctx caddy.Context, path string, static *caddyauth.HTTPBasicAuth, logger *zap.Logger) (*usersFile, error) {
	u := &usersFile{path: path, ctx: ctx, logger: logger}
	if static != nil {
		u.realm, u.hash.other = static.Realm, static.Hash
		for _, account := range static.Accounts {
			if isPublished(account.Password) {
				return nil, fmt.Errorf("basic_auth: the user %q has %w", account.Username, errPublished)
			}
			u.static = append(u.static, account)
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	u.checkAt.Store(monotime.Of(time.Now().Add(usersFileInterval)))
	return u, u.load(info)
}

// current returns the provider of the users as the file now has them.
func (u *usersFile) current() *caddyauth.HTTPBasicAuth {
	now := time.Now()
	if at := u.checkAt.Load(); monotime.Of(now) >= at && u.checkAt.CompareAndSwap(at, monotime.Of(now.Add(usersFileInterval))) {
		u.refresh()
	}
	return u.users.Load()
}

// refresh reads the file again if it has changed.
func (u *usersFile) refresh() {
	u.mu.Lock()
	defer u.mu.Unlock()
	info, err := os.Stat(u.path)
	if err == nil && os.SameFile(info, u.read) && info.ModTime().Equal(u.read.ModTime()) && info.Size() == u.read.Size() {
		return
	}
	if err == nil {
		err = u.load(info)
	}
	if err != nil {
		u.logger.Error("users_file cannot be read; the users stay as they were", zap.String("file", u.path), errorField(err))
		return
	}
	u.logger.Info("users_file has been read again", zap.String("file", u.path), zap.Int("users", len(u.users.Load().Accounts)))
}

// load reads the file. After a mistake it reads it again only once it has changed.
func (u *usersFile) load(info os.FileInfo) error {
	u.read = info
	accounts, err := readUsers(u.path)
	if err != nil {
		return err
	}
	for _, account := range u.static {
		if slices.ContainsFunc(accounts, func(a caddyauth.Account) bool { return a.Username == account.Username }) {
			return fmt.Errorf("the user '%s' is in basic_auth, too; expected each user once", account.Username)
		}
	}
	ctx, cancel := caddy.NewContext(u.ctx)
	users := &caddyauth.HTTPBasicAuth{AccountList: append(accounts, u.static...), Realm: u.realm}
	if err := users.Provision(ctx); err != nil {
		cancel()
		return err
	}
	users.Hash = u.hash
	hideUnknownUsers(users, caddyauth.BcryptHash{}.FakeHash()) // of the algorithm that it is provisioned with
	u.users.Store(users)
	if u.release != nil {
		u.release()
	}
	u.release = cancel
	return nil
}

// readUsers reads a file with a user and a hash on each line, as htpasswd writes it.
func readUsers(path string) (accounts []caddyauth.Account, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxUsersFile {
		return nil, fmt.Errorf("%s has %d bytes; expected at most %d", path, info.Size(), maxUsersFile)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	known := make(map[string]bool)
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		account, err := readUser(line)
		if err == nil && known[account.Username] {
			err = fmt.Errorf("the user '%s' is listed twice; expected each user once", account.Username)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, n, err)
		}
		known[account.Username] = true
		accounts = append(accounts, account)
	}
	return accounts, nil
}

// readUser reads one line. Its errors do not quote the hash, in place of which the line may have a
// password.
func readUser(line string) (account caddyauth.Account, err error) {
	user, hash, found := strings.Cut(line, ":")
	switch algorithm := hashAlgorithm(hash); {
	case !found || user == "":
		err = errors.New("the line is not a user and a hash; expected <user>:<hash>, as htpasswd -B prints it")
	case algorithm == "" || checkHash(algorithm, hash) != nil:
		err = fmt.Errorf("the hash of the user '%s' is not valid; expected one of bcrypt or argon2id, as htpasswd -B or caddy hash-password prints it", user)
	case isPublished(hash):
		err = fmt.Errorf("the user '%s' has %w", user, errPublished)
	}
	return caddyauth.Account{Username: user, Password: hash}, err
}

// hashAlgorithm returns the algorithm of a hash, or "" if it is not known.
func hashAlgorithm(hash string) string {
	switch {
	case strings.HasPrefix(hash, "$2"):
		return "bcrypt"
	case strings.HasPrefix(hash, "$argon2id$"):
		return "argon2id"
	}
	return ""
}

// anyHash compares passwords with hashes of all algorithms that a file may have.
type anyHash struct {
	other caddyauth.Comparer // for the other hashes of basic_auth; nil: there are none
}

// Compare implements caddyauth.Comparer.
func (h anyHash) Compare(hashed, plaintext []byte) (bool, error) {
	switch algorithm := hashAlgorithm(string(hashed)); {
	case algorithm == "argon2id":
		return caddyauth.Argon2idHash{}.Compare(hashed, plaintext)
	case algorithm == "" && h.other != nil:
		return h.other.Compare(hashed, plaintext)
	}
	return caddyauth.BcryptHash{}.Compare(hashed, plaintext)
}

// Authenticate implements caddyauth.Authenticator.
func (u *usersFile) Authenticate(w http.ResponseWriter, r *http.Request) (caddyauth.User, bool, error) {
	return u.current().Authenticate(w, r)
}
